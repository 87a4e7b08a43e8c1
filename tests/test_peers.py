"""A step of our scripts is one of TRL 1.16, a merged model one of mergekit 0.1.5: the same numbers.

Both are in benchmarks/requirements.txt only; what is not installed, or another TRL, is skipped.
"""

import importlib
import shutil
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import datasets
import pytest
import torch
from conftest import DATA, read_lines
from helpers import trainer
from safetensors.torch import load_file, save_file
from samples import asked, said, stock
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import distill
import dpo
import ipo_kto_simpo_orpo as second
import merge
from common import collate, segment_sum, token_logprobs

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"compares with TRL 1.16, not {trl.__version__}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")

PAIRS = read_lines(DATA / "peer_pairs.jsonl")  # either answer may be the longer one, by a little or by a lot
LEARNING_RATE = 1e-4
LOSS = {"abs": 1e-4, "rel": 1e-6}  # float32 has no more digits for a loss above a hundred (sppo)
METRIC = {"abs": 1e-3, "rel": 1e-5}
WEIGHTS = 1e-5  # a tenth of what one step moves them


class Step(NamedTuple):
    """What one optimizer step read, logged and left."""

    sequences: list  # sorted (token ids, which of them are trained), as tuples
    metrics: dict
    weights: dict


@pytest.fixture(scope="module")
def models(random_model, tmp_path_factory):
    """Two folders, policy and reference: Qwen3 of other seeds, in float32, whose log-probs differ by nats."""
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    tokenizer.chat_template = (DATA / "marked_to_the_end.jinja").read_text()
    config = AutoConfig.from_pretrained(random_model)
    config.initializer_range, config.dtype = 0.2, torch.float32
    folders = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
        folders.append(tmp_path_factory.mktemp("model"))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


def talks() -> list[dict]:
    """The pairs as messages."""
    return [{k: asked(text) if k == "prompt" else said(text) for k, text in row.items()} for row in PAIRS]


@pytest.fixture
def our_step(models, tmp_path, monkeypatch, one_cpu):
    """our_step(script, rows, **flags) -> Step: main() of a script for one step on all rows."""

    def run(script: str, rows: list[dict], **flags) -> Step:
        module, seen = importlib.import_module(script), []
        collate = module.common.collate

        def watched(sequences, *args, **kwargs):
            sequences = list(sequences)
            seen.append([(list(map(int, ids)), list(map(int, trained))) for ids, trained in sequences])
            return collate(sequences, *args, **kwargs)

        monkeypatch.setattr(module.common, "collate", watched)
        flags |= {"learning_rate": LEARNING_RATE, "lr_schedule": "constant", "batch_size": len(rows)}
        train = trainer(module, tmp_path, model=str(models[0]), max_steps=1)
        folder, lines = train(rows, **flags)
        weights = load_file(folder / "model" / "model.safetensors")
        # Nothing is evaluated: the last row is the one that was trained.
        return Step(as_set(seen[-1]), lines[-1], weights)

    return run


@pytest.fixture
def trl_step(models, tmp_path, one_cpu):
    """trl_step(trainer_class, config_class, rows, **settings) -> Step: a TRL trainer's step on all rows."""

    def run(trainer_class, config_class, rows, policy=models[0], reference=None, **settings) -> Step:
        common = {"output_dir": str(tmp_path / "trl"), "learning_rate": LEARNING_RATE, "max_steps": 1}
        common |= {"per_device_train_batch_size": len(rows), "train_sampling_strategy": "sequential"}
        common |= {"lr_scheduler_type": "constant", "gradient_checkpointing": False, "use_cpu": True}
        common |= {"bf16": False, "save_strategy": "no", "logging_steps": 1}
        common |= {"report_to": "none", "disable_tqdm": True}
        ref_model = {} if reference is None else {"ref_model": stock(reference)}
        trainer = trainer_class(
            model=str(policy),
            args=config_class(**common | settings),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(policy),
            **ref_model,
        )
        batches = list(trainer.get_train_dataloader())
        assert len(batches) == 1
        trainer.train()
        metrics = [line for line in trainer.state.log_history if "loss" in line][-1]
        return Step(as_set(unpadded(batches[0])), metrics, trainer.model.state_dict())

    return run


def unpadded(batch: dict) -> list:
    """The sequences of a collated batch of TRL: (token ids, which of them are trained)."""
    found = []
    for prefix in ("", "chosen_", "rejected_"):
        if f"{prefix}input_ids" in batch:
            ids, attended = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"].bool()
            labels = batch.get(f"{prefix}labels", torch.full_like(ids, -100))  # none for a reward model
            trained = batch["completion_mask"] if "completion_mask" in batch else labels != -100
            for row, keep, marks in zip(ids, attended, trained, strict=True):
                found.append((row[keep].tolist(), marks[keep].int().tolist()))
    return found


def as_set(sequences) -> list:
    """Sequences in an order that does not depend on who packed or padded them."""
    return sorted((tuple(ids), tuple(trained)) for ids, trained in sequences)


def weight_differences(one: dict, other: dict) -> torch.Tensor:
    """Of each weight, how far two models are apart."""
    return torch.cat([(weight - other[name]).abs().flatten() for name, weight in one.items()])


def assert_same_step(ours: Step, theirs: Step, *metrics: str):
    """The same tokens, the same loss and gradient, and `metrics` alike."""
    assert ours.sequences == theirs.sequences
    assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], **LOSS)
    for name in ("grad_norm", *metrics):
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], **METRIC), name
    # Adam's first step moves each weight by the learning rate, whatever its gradient is, but for gradients so
    # small that rounding turns them: few, so the mean tells equal gradients from others on any machine.
    assert weight_differences(ours.weights, theirs.weights).mean().item() < 1e-3 * LEARNING_RATE


def assert_same_function(ours, theirs, *inputs: torch.Tensor):
    """Equal values, (B,), and equal gradients by the first input, in float32."""
    results = []
    for function in (ours, theirs):
        variable = inputs[0].clone().requires_grad_()
        values = function(variable, *inputs[1:])
        assert values.shape == variable.shape
        results.append((values, torch.autograd.grad(values.sum(), variable)[0]))
    for our, their in zip(*results, strict=True):
        assert torch.allclose(our, their, rtol=1e-4, atol=1e-5)


def trl_loss(loss_type, **settings):
    """The loss of TRL's CPOTrainer or ORPOTrainer, a method, as a function."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    trainer = SimpleNamespace(**defaults | settings, loss_type=loss_type)
    if loss_type == "orpo":
        return lambda *logps: -ORPOTrainer.odds_ratio_loss(trainer, *logps)[0]
    return lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)[0]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


LOGPS = ("logps/chosen", "logps/rejected")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@pytest.fixture
def dpo_steps(our_step, trl_step, models):
    """dpo_steps(rows, loss, loss_type, both, ours, theirs): the step of dpo.py and that of DPOTrainer."""

    def run(rows, loss, loss_type, both, ours=(), theirs=()) -> tuple[Step, Step]:
        both = {"beta": 0.1} | both
        reference = {"ref_model": str(models[1])}
        our = our_step("dpo", rows, loss=loss, **reference, **both, **dict(ours))
        settings = {"loss_type": loss_type, **both, **dict(theirs)}
        return our, trl_step(trl.DPOTrainer, trl.DPOConfig, rows, reference=models[1], **settings)

    return run


# What is not a default of both: with TRL's label_smoothing, 0, exo has no value, and averaged log-ratios are
# small and want a larger beta.
@pytest.mark.parametrize("case", read_lines(DATA / "peer_losses.jsonl"), ids=lambda case: case["loss"])
def test_a_dpo_step_is_that_of_trl(case, dpo_steps):
    ours, theirs = dpo_steps(talks(), case["loss"], [case["loss_type"]], case["both"])
    # TRL logs the rewards of sums where the loss is of averages; ours are those of the loss.
    assert_same_step(ours, theirs, *LOGPS, *(REWARDS if case["loss"] != "sigmoid_norm" else ()))


def test_a_dpo_step_leaves_the_weights_of_trl(dpo_steps, models):
    # So strong a decay moves a weight as much as its gradient does. Both decay matrices, not norms.
    ours, theirs = dpo_steps(talks(), "sigmoid", ["sigmoid"], {"weight_decay": 5.0})
    before = load_file(models[0] / "model.safetensors")
    assert weight_differences(ours.weights, before).median() > 0.9 * LEARNING_RATE
    assert weight_differences(ours.weights, theirs.weights).max() < WEIGHTS


# Texts whose tokens do not merge across the end of the prompt.
TEXTS = [{k: text if k == "prompt" else f" {text}" for k, text in row.items()} for row in PAIRS]
MOVING = {"ref": "live", "sync_ref_every": 1, "sync_ref_alpha": 0.6}
TRL_MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6}
STEPS = {  # rows, loss types of TRL, settings of both, flags of ours, settings of TRL
    "texts": (TEXTS, ["sigmoid"], {}, {}, {}),
    "a live reference": (talks(), ["sigmoid"], {"beta": 0.5}, {"ref": "live"}, {}),
    "a moving reference": (talks(), ["sigmoid"], {"max_steps": 2, "max_grad_norm": 0.5}, MOVING, TRL_MOVING),
    "RPO": (talks(), ["sigmoid", "sft"], {}, {"sft_coef": 0.7}, {"loss_weights": [1.0, 0.7]}),
}


@pytest.mark.parametrize(("rows", "loss_type", "both", "flags", "settings"), STEPS.values(), ids=STEPS)
def test_a_dpo_step_with_other_settings_is_that_of_trl(rows, loss_type, both, flags, settings, dpo_steps):
    ours, theirs = dpo_steps(rows, "sigmoid", loss_type, both, flags, settings)
    assert_same_step(ours, theirs, *LOGPS, *REWARDS)


def test_an_sft_step_is_that_of_trl(our_step, trl_step):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in talks()]
    ours, theirs = our_step("sft", rows), trl_step(trl.SFTTrainer, trl.SFTConfig, rows)
    assert_same_step(ours, theirs, "mean_token_accuracy", "num_tokens")
    assert weight_differences(ours.weights, theirs.weights).max() < WEIGHTS


SECOND = "ipo_kto_simpo_orpo"


def test_an_ipo_step_is_that_of_trl(our_step, trl_step, models):
    # TRL averages the log-ratios over an answer's tokens, which the paper does not; ours does so when asked.
    reference = {"ref_model": str(models[1])}
    ours = our_step(SECOND, talks(), algorithm="ipo", ipo_length_average=True, beta=0.3, **reference)
    settings = {"reference": models[1], "loss_type": ["ipo"], "beta": 0.3}
    theirs = trl_step(trl.DPOTrainer, trl.DPOConfig, talks(), **settings)
    assert_same_step(ours, theirs, *LOGPS)  # TRL logs the rewards of sums, ours are those of the loss


# DPOTrainer ignores label_smoothing for sigmoid and has no IPO of summed log-probs; CPOTrainer has both.
# Its SimPO takes gamma itself. The mean log-probs of ORPO go from -0.005, an answer nearly certain, to -100.
SIMPO = {"beta": 2.5, "gamma_beta_ratio": 0.6}
FUNCTIONS = {  # name in TRL: our function, its settings, another setting of TRL, inputs
    "sigmoid": (dpo.dpo_loss, {"beta": 0.3, "label_smoothing": 0.2}, {}, 5 * normal(2, 16)),
    "ipo": (second.ipo_loss, {"beta": 0.2}, {}, 5 * normal(2, 16)),
    "simpo": (second.simpo_loss, SIMPO, {"simpo_gamma": 1.5}, normal(2, 16) - 3),
    "orpo": (second.orpo_loss, {"beta": 0.4}, {}, -normal(2, 64).mul(2).exp()),
}


@pytest.mark.parametrize("loss_type", FUNCTIONS)
def test_a_loss_and_its_gradient_are_those_of_trl(loss_type):
    loss, flags, more, inputs = FUNCTIONS[loss_type]
    assert_same_function(partial(loss, **flags), trl_loss(loss_type, **flags, **more), *inputs)


@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
def test_a_simpo_step_is_that_of_trl(sft_coef, our_step, trl_step):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    flags = {"beta": 2.0, "gamma_beta_ratio": 0.4, "sft_coef": sft_coef}
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": sft_coef}
    ours = our_step(SECOND, talks(), algorithm="simpo", **flags)
    theirs = trl_step(CPOTrainer, CPOConfig, talks(), **settings)
    assert_same_step(ours, theirs, *REWARDS)  # TRL logs averages as logps, ours are sums


def test_an_orpo_step_differs_from_trls_by_the_likelihood_of_the_prompt(our_step, trl_step):
    """Deviation of orpo: TRL's and the authors' likelihood is over the prompt, too; the rest is the same."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    ours = our_step(SECOND, talks(), algorithm="orpo", beta=0.5)
    theirs = trl_step(ORPOTrainer, ORPOConfig, talks(), beta=0.5)
    for name in REWARDS:
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], **METRIC), name


def summed_logps(folder, sequences) -> torch.Tensor:
    """Summed log-probs (B,) of the trained tokens of sequences under the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="packed")
    batch = collate(sequences)
    with torch.no_grad():
        return segment_sum(token_logprobs(model, batch), batch.sequence_index, batch.num_sequences)


KTO = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7}


@pytest.mark.parametrize("roles", [(0, 1), (1, 0)], ids=["kl_cut_at_0", "kl_above_0"])
def test_kto_loss_is_that_of_trl_for_its_kl(roles, trl_step, models):
    policy, reference = (models[i] for i in roles)
    labels = (True, False, True, True, False, True, False, True)
    answers = [row["chosen" if good else "rejected"] for row, good in zip(talks(), labels, strict=True)]
    columns = zip((row["prompt"] for row in talks()), answers, labels, strict=True)
    rows = [{"prompt": prompt, "completion": answer, "label": good} for prompt, answer, good in columns]
    theirs = trl_step(trl.KTOTrainer, trl.KTOConfig, rows, policy, reference, **KTO)
    template = partial(AutoTokenizer.from_pretrained(policy).apply_chat_template, return_dict=False)
    prompts = [template(row["prompt"], add_generation_prompt=True) for row in rows]
    wholes = [template(row["prompt"] + row["completion"]) for row in rows]
    trained = [[0] * len(p) + [1] * (len(w) - len(p)) for p, w in zip(prompts, wholes, strict=True)]
    sequences = list(zip(wholes, trained, strict=True))
    assert as_set(sequences) == theirs.sequences
    logps, ref_logps = (summed_logps(folder, sequences) for folder in (policy, reference))
    kl = torch.tensor(theirs.metrics["kl"])
    assert (kl > 0) == (roles == (1, 0))  # the mean log-ratio of mismatched answers has the other sign then
    losses = second.kto_loss(logps - ref_logps, torch.tensor(labels), kl, **KTO)
    assert losses.shape == (8,)
    assert losses.mean().item() == pytest.approx(theirs.metrics["loss"], **LOSS)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_are_those_of_trls_gkd(temperature):
    # Its beta 0 and 1 stand for the two KLs; it has no factor of the squared temperature.
    from trl.experimental.gkd import GKDTrainer

    student, teacher = 2 * normal(2, 6, 9).double()
    settings = {"temperature": temperature, "reduction": "none"}
    kinds = {0: distill.forward_kl, 1: distill.reverse_kl}
    kinds |= {beta: partial(distill.jsd, beta=beta) for beta in (0.1, 0.5, 0.9)}
    for beta, kind in kinds.items():
        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, **settings).sum(-1)
        ours = kind(*((x / temperature).log_softmax(-1) for x in (student, teacher)))
        assert torch.allclose(ours, theirs, atol=1e-12), beta


@pytest.fixture
def judge(models, tmp_path):
    """A folder with a classifier of one output, its head included: both sides start from it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        options = {"num_labels": 1, "dtype": torch.float32}
        model = AutoModelForSequenceClassification.from_pretrained(models[0], **options)
    model.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


MARGINS = (0.5, 0.0, 1.0, -0.5, 0.2, 2.0, 0.0, 0.1)


@pytest.mark.parametrize("center_coef", [0.0, 0.3])
@pytest.mark.parametrize("margins", [None, MARGINS], ids=["plain", "margins"])
def test_a_reward_model_step_is_that_of_trl(center_coef, margins, our_step, trl_step, judge):
    rows = [row | ({"margin": margins[n]} if margins else {}) for n, row in enumerate(talks())]
    ours = our_step("reward_model", rows, model=str(judge), center_coef=center_coef)
    settings = {"center_rewards_coefficient": center_coef} if center_coef else {}
    theirs = trl_step(trl.RewardTrainer, trl.RewardConfig, rows, policy=judge, **settings)
    # What is read for the training set's mean comes last: the same sequences. TRL has no marks.
    assert sorted(ids for ids, _ in ours.sequences) == sorted(ids for ids, _ in theirs.sequences)
    metrics = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    assert abs(ours.metrics["margin"]) > 1e-2
    assert_same_step(ours._replace(sequences=theirs.sequences), theirs, *metrics)
    assert weight_differences(ours.weights, theirs.weights).max() < WEIGHTS


# Merging ----------------------------------------------------------------------------------------------------


@pytest.fixture
def merged_by_both(models, tmp_path, one_cpu):
    """merged_by_both(method, settings of mergekit, **flags) -> the tensors of both; base: models[0]."""
    mergekit = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    folders, change = [models[0]], torch.Generator().manual_seed(5)
    for i in (1, 2):  # fine-tuned from the base: as far from it as it is long
        tensors = load_file(models[0] / "model.safetensors")
        folders.append(tmp_path / f"tuned{i}")
        shutil.copytree(models[0], folders[-1])
        noise = {k: torch.randn(x.shape, generator=change) for k, x in tensors.items()}
        moved = {k: x + x.std().clamp(min=0.1) * noise[k] for k, x in tensors.items()}
        save_file(moved, folders[-1] / "model.safetensors", {"format": "pt"})

    def run(method: str, parameters: list[dict], shared: dict, **flags) -> tuple[dict, dict]:
        base = {} if method == "linear" else {"base_model": str(folders[0])}
        chosen = folders[1 : len(parameters) + 1]
        named = [{"model": str(f), "parameters": p} for f, p in zip(chosen, parameters, strict=True)]
        if method == "slerp":
            named.insert(0, {"model": str(folders[0])})
        config = {"merge_method": method, "models": named, "parameters": shared, "dtype": "float32"} | base
        theirs = tmp_path / "theirs"
        options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
        mergekit.run_merge(MergeConfiguration.model_validate(config), str(theirs), options)
        flags |= {"base": base.get("base_model"), "models": tuple(map(str, chosen)), "report": False}
        flags |= {"method": method, "compat": "mergekit", "output_dir": str(tmp_path / "ours")}
        merge.main(merge.Args(**flags))
        files = sorted(theirs.glob("*.safetensors"))
        tensors = {name: x for path in files for name, x in load_file(path).items()}
        return load_file(tmp_path / "ours" / "model" / "model.safetensors"), tensors

    return run


@pytest.mark.parametrize("case", read_lines(DATA / "mergekit.jsonl"), ids=lambda case: case["method"])
def test_a_merge_is_that_of_mergekit(case, merged_by_both, models):
    """Its settings of each model and of all, and our flags."""
    ours, theirs = merged_by_both(case["method"], case["models"], case["shared"], **case["flags"])
    assert ours.keys() == theirs.keys()
    gaps = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    assert {name: gap for name, gap in gaps.items() if not gap < 1e-5} == {}
    base = load_file(models[0] / "model.safetensors")
    assert all((ours[name] - base[name]).abs().max() > 1e-3 for name in ours)


# The rows of the table in docs/merge.md, on numbers that a random model does not have.


def largest_kept(changes: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Changes (1, n) between two ranks, by the functions of merge.py."""

    def kth_largest(k):
        return merge.kth_largest(lambda upper: merge.magnitude_counts(changes, upper), [k])

    return merge.trim(changes, kth_largest(last), kth_largest(first))[0]


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 0.9])
def test_what_ties_and_breadcrumbs_keep_is_what_mergekit_keeps(gamma):
    sparsify, random = pytest.importorskip("mergekit.sparsify"), torch.Generator().manual_seed(1)
    for n in range(1, 60):
        for density in (0.01, 0.1, 0.3, 0.5, 0.97, 1.0):
            changes = torch.randn(1, n, generator=random)
            ranks = merge.breadcrumb_ranks(n, density, gamma, compat="mergekit")
            theirs = sparsify.magnitude_outliers(changes[0], density, gamma=gamma)
            assert torch.equal(largest_kept(changes, *ranks), theirs), (n, density)
            theirs = sparsify.magnitude(changes[0], density)
            assert torch.equal(largest_kept(changes, 1, max(1, int(density * n))), theirs), (n, density)


def test_signs_sums_and_divisors_are_those_of_mergekit():
    pytest.importorskip("mergekit.merge")
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    random = torch.Generator().manual_seed(1)
    for _ in range(50):  # small whole numbers: sums of 0, and equal sizes, are common
        changes = torch.randint(-3, 4, (3, 40), generator=random).float()
        weights = torch.randint(-3, 4, (3,), generator=random) / 2
        weighted = changes * weights[:, None]
        mask = get_mask(weighted)
        total, divisor = (weighted * mask).sum(0), (weights[:, None] * mask).sum(0)
        divisor[divisor == 0] = 1
        assert torch.equal(merge.ties(changes, weights, compat="mergekit", mean=False), total)
        assert torch.allclose(merge.ties(changes, weights, compat="mergekit"), total / divisor)


def test_model_stock_and_slerp_at_their_limits_are_those_of_mergekit():
    pytest.importorskip("mergekit.merge")
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.model_stock import model_stock_merge_method
    from mergekit.merge_methods.slerp import slerp

    random = torch.Generator().manual_seed(1)
    base, shared, *own = torch.randn(4, 500, generator=random)
    for size in (1.0, 1e-4, 1e-5):  # the product of the norms goes from 1e3 to 1e-7
        models = torch.stack([base + size * (shared + x) for x in own])
        ratio = merge.model_stock_ratio(merge.gram(base, models - base), compat="mergekit")
        [theirs] = model_stock_merge_method([TensorGroup.from_tensors([base, *models], base_index=0)])
        change = models.mean(0) - base
        assert ratio == pytest.approx(((theirs - base) @ change / (change @ change)).item(), rel=0.01), size
    for other in (base + 0.01 * shared, base + shared, -base, torch.zeros(500)):
        inner = merge.gram(base, (other - base)[None])
        coefficients = merge.slerp_coefficients(inner, 0.3, compat="mergekit")
        [theirs] = slerp(torch.tensor([0.3]), base[None], other[None])
        assert torch.allclose(merge.slerp(base, other, coefficients), theirs, atol=1e-5)


def test_dare_rescales_as_mergekit_does(merged_by_both, models, tmp_path):
    sparsify = pytest.importorskip("mergekit.sparsify")
    flags = {"density": 0.3, "report": False, "base": str(models[0]), "models": (str(tmp_path / "tuned1"),)}
    flags |= {"method": "dare_linear", "compat": "mergekit", "output_dir": str(tmp_path / "ours")}
    merge.main(merge.Args(**flags))
    ours = load_file(tmp_path / "ours" / "model" / "model.safetensors")
    base, tuned = (load_file(f / "model.safetensors") for f in (models[0], tmp_path / "tuned1"))
    for name in base:
        change = tuned[name] - base[name]
        mask = (merge.uniform(1, 0, name, slice(0, change.numel())) < 0.3).view_as(change)
        theirs = base[name] + sparsify.rescaled_masked_tensor(change, mask, sparsify.RescaleNorm.l1)
        assert torch.allclose(ours[name], theirs, atol=1e-5), name
