"""Settings, options and fixtures of the tests: offline, CPU, two threads, slow tests only when asked for."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).with_name("data")
sys.path.insert(0, str(ROOT))
FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported what takes seconds
FORKS.set_forkserver_preload(["test_smoke", "sft"])

# Before torch, transformers or wandb are imported, so that they and the subprocesses of the tests see them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    PYTHONPATH=f"{ROOT}:{ROOT}/tests",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # equal sums on any machine; two workers share two cores

RANDOM_MODEL_TEXT = [
    "The sky is blue today and the sky was blue yesterday.",
    "What color is the sky? It is blue. What color is the grass? It is green.",
    "Think, then answer: two and two are four, three and three are six.",
    "You are a helpful assistant. Be brief. Thank you, that is right.",
    "Nora has 12 apples and gives away 5. How many apples does Nora have left? 12 - 5 = 7",
]


def start(*command, cwd, timeout=300, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end, on one thread, without a GPU; after `timeout` seconds end all it started."""
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), cwd=cwd, env=os.environ | environment, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, if need be by force after 30 seconds
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def write_rows(path, rows) -> str:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path) -> list[dict]:
    """Read a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def fork(function, *args, cwd, **environment):
    """Begin a call in a process of its own, which writes to `output` in `cwd`; `join` it, see `exitcode`."""
    process = FORKS.Process(target=call_in, args=(cwd, environment, function, args))
    process.start()
    return process


def call_in(cwd, environment, function, args):
    """Call a function in a folder, with some more environment and all that it prints in a file."""
    os.chdir(cwd)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    function(*args)


def run_command(script, *words):
    """What `python script words` does, in a process of its own that has imported most of it: see `fork`."""
    sys.argv = [str(script), *map(str, words)]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(str(script), run_name="__main__")


def two_processes(function, *args, cwd):
    """Call a function in two processes of one group, as torchrun does; both must end well."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    group["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # what torchrun sets: the store is there already
    processes = [fork(function, *args, cwd=cwd, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0], (cwd / "output").read_text()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes each)")
    parser.addoption("--vllm", action="store_true", help="also run the tests of --rollout vllm (3.5 GB)")
    parser.addoption("--gpu", action="store_true", help="let the tests see the GPU, and run those marked gpu")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    for item in items:
        for marker in ("slow", "gpu", "vllm"):
            if marker in item.keywords and not config.getoption(f"--{marker}"):
                item.add_marker(pytest.mark.skip(reason=f"needs --{marker}"))


@pytest.fixture(autouse=True)
def own_signals():
    """A run takes SIGTERM and Ctrl-C; behind it they are pytest's again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Runs draw no curves, which takes half the time of a short one, but where a test asks for `figures`."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: Path(path).touch())


@pytest.fixture
def figures():
    """Runs draw their curves, as they do for a user."""


@pytest.fixture
def forked(tmp_path):
    """forked(function, ...) -> exit status and all that it printed, of a call in tmp_path: see `fork`."""

    def run(function, *args):
        process = fork(function, *args, cwd=tmp_path)
        process.join(300)
        told = (tmp_path / "output").read_text()
        (tmp_path / "output").unlink()
        return process.exitcode, told

    return run


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the embedded tokenizer, checkpoints and data."""
    return ROOT / "tiny"


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """A local copy of GSM8K: $CLEANPOST_GSM8K, else ../shared/data/gsm8k; the test is skipped without one."""
    path = Path(os.environ.get("CLEANPOST_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))
    if not path.is_dir():
        pytest.skip("no local copy of GSM8K")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real model, SmolLM2-135M-Instruct, for slow tests: made once by ../shared/data/get_smollm2.py."""
    folder = Path.home() / ".cache" / "cleanpost" / "smollm2"
    maker, half = ROOT.parent / "shared" / "data" / "get_smollm2.py", folder.with_name("smollm2.half")
    if not folder.exists():
        pytest.importorskip("gguf")
        pytest.importorskip("accelerate")
        if not maker.exists():
            pytest.skip("no ../shared/data/get_smollm2.py")
        half.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, maker, half], check=True)
        half.rename(folder)
    return folder


@pytest.fixture
def one_cpu(monkeypatch):
    """One thread, which is fastest for small models and sums alike on any machine, and no GPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def process_group():
    """A group of one process, as every script begins with."""
    import sft

    interrupt = signal.getsignal(signal.SIGINT)
    sft.setup_distributed()
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A folder with a random model (Qwen3, tied, bfloat16), its tokenizer learnt from `RANDOM_MODEL_TEXT`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": specials}
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, **letters)
    bpe.train_from_iterator(RANDOM_MODEL_TEXT, trainer)
    marks = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": specials[1:2],
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **marks)
    tokenizer.chat_template = (DATA / "marked.jinja").read_text()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**sizes, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("random_model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_classifiers(tmp_path_factory) -> dict[str, str]:
    """Folders of small random float32 models with tiny's tokenizer: classifiers and a language model."""
    import torch
    import transformers as hf

    sizes = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1}
    sizes |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    sizes |= {"max_position_embeddings": 2048, "initializer_range": 0.2}
    kinds = {"qwen3": hf.Qwen3ForSequenceClassification, "llama": hf.LlamaForSequenceClassification}
    found = {}
    for name, model_class in (kinds | {"causal": hf.Qwen3ForCausalLM}).items():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = model_class(model_class.config_class(**sizes))
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
        hf.AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft").save_pretrained(found[name])
    return found


@pytest.fixture
def fake(tmp_path):
    """fake("a.py", (old, new), ...) writes a small script that obeys every house rule, then edits it."""

    def write(name="fake.py", *edits):
        text = (DATA / "fake_script.py").read_text()
        for old, new in edits:
            assert old in text, f"the fake script has no {old!r}"
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
