"""The methods of leaderboard.py: their commands, the data they read, and how their tokens are counted."""

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

from learning import ROOT

sys.path.insert(0, str(ROOT))

WORK = Path("runs/leaderboard")  # relative to the repository, for the commands in the result
NUM_PROMPTS, SEARCH_SEED = 1792, 0  # of prompts_train; the 256 behind them choose the learning rate
LENGTH = 20.5  # tokens of a sampled answer, roughly: what is counted is what a run has sampled
WORKED = f"--model tiny/sft --eval-dataset {WORK}/held_answers.jsonl"
DATA = {  # flags of a script; those of the others are ONLINE
    "dpo.py": f"--eval-dataset {WORK}/held_pairs.jsonl",
    "ipo_kto_simpo_orpo.py": f"--eval-dataset {WORK}/held_pairs.jsonl",
    "sft.py": WORKED,
    "distill.py": f"{WORKED} --teacher {WORK}/teacher/model --prompt-dataset {WORK}/prompts.jsonl",
}
ONLINE = f"--dataset {WORK}/prompts.jsonl --eval-dataset {WORK}/held_prompts.jsonl --num-eval 128"
ONLINE += " --eval-samples 2"
GSPO = "--num-minibatches 4 --importance-sampling sequence --epsilon 3e-4 --epsilon-high 4e-4"
CISPO = "--num-minibatches 4 --policy-loss cispo --loss-agg token_mean --epsilon-high 4"
SEQ_KD = "--mode seq_kd --reward rewards.py:math_answer --answers-per-prompt 2"
ON_POLICY = "--mode on_policy --on-policy-fraction 1"


@dataclass(frozen=True)
class Method:
    label: str
    script: str
    flags: str = ""  # beside those of DATA
    kind: str = "sampled"  # tokens that count: sampled ones, those of RFT's rounds, or an offline dataset's
    answers: float = 128  # sampled, or trained on, in a step; of RFT to a prompt, in all rounds
    group: float = 8  # answers to a prompt; of iterative DPO times the steps of a round
    rate: float = 1e-4  # the middle of the search: the default of scripts that start from tiny/sft


METHODS = {
    "ppo": Method("PPO", "ppo_rlhf.py", "--reward rewards.py:math_answer --kl-coef 0", group=4),
    "grpo": Method("GRPO", "grpo.py"),
    "grpo_4": Method("GRPO, 4 updates a rollout", "grpo.py", "--num-minibatches 4"),
    "dr_grpo": Method("Dr. GRPO", "grpo.py", "--scale-rewards none --loss-agg seq_mean_token_sum_norm"),
    "gspo": Method("GSPO", "grpo.py", GSPO),
    "cispo": Method("CISPO", "grpo.py", CISPO),
    "dapo": Method("DAPO", "dapo.py"),
    "rloo": Method("RLOO", "rloo_remax.py", "--algorithm rloo"),
    "remax": Method("ReMax", "rloo_remax.py", "--algorithm remax", answers=144, group=9),  # and a greedy one
    "reinforce_pp": Method("REINFORCE++", "rloo_remax.py", "--algorithm reinforce_pp"),
    "online_dpo": Method("online DPO", "online_dpo.py", answers=64, group=4),
    "iterative_dpo": Method("iterative DPO", "online_dpo.py", "--algorithm iterative_dpo", "sampled", 64, 40),
    "rft": Method("RFT", "rejection_sampling.py", kind="rounds", answers=24, rate=3e-4),
    "dpo": Method("DPO", "dpo.py", kind="preference_train", answers=32),
    "ipo": Method("IPO", "ipo_kto_simpo_orpo.py", "--algorithm ipo", "preference_train", 32),
    "kto": Method("KTO", "ipo_kto_simpo_orpo.py", "--algorithm kto", "unpaired_train", 32),
    "simpo": Method("SimPO", "ipo_kto_simpo_orpo.py", "--algorithm simpo", "preference_train", 32),
    "orpo": Method("ORPO", "ipo_kto_simpo_orpo.py", "--algorithm orpo", "preference_train", 32),
    "sft": Method("SFT, noisy answers", "sft.py", kind="sft_train", answers=32, rate=3e-4),
    "sft_right": Method(
        "SFT, right answers", "sft.py", f"--dataset {WORK}/right.jsonl", "right", 32, rate=3e-4
    ),
    "token_kd": Method("distill, token_kd", "distill.py", kind="sft_train", answers=32, rate=3e-4),
    "seq_kd": Method("distill, seq_kd", "distill.py", SEQ_KD, "answers", 32, rate=3e-4),
    "on_policy": Method("distill, on_policy", "distill.py", ON_POLICY, answers=32, group=1, rate=3e-4),
}


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------
def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "tiny" / "data" / f"{name}.jsonl").open()]


@cache
def load_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft")


def write_data():
    """Prompts that are trained on, those of the search in the formats of all scripts, and right answers."""
    say = lambda text: [{"role": "assistant", "content": text}]
    prompts = rows_of("prompts_train")
    held = [(row["prompt"], say(f"#### {row['answer']}")) for row in prompts[NUM_PROMPTS:]]
    files = {
        "prompts": prompts[:NUM_PROMPTS],
        "held_prompts": prompts[NUM_PROMPTS:],
        "held_answers": [{"prompt": x, "completion": y} for x, y in held],
        "held_pairs": [{"prompt": x, "chosen": y, "rejected": say("#### none")} for x, y in held],
        "right": [{"messages": pair["prompt"] + pair["chosen"]} for pair in rows_of("preference_train")],
    }
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (ROOT / WORK / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mean_tokens(answers: list[list[str]]) -> float:
    """Mean number of tokens of a row's answers, which go through the loss, each with its end."""
    return mean(sum(len(load_tokenizer()(text).input_ids) + 1 for text in texts) for texts in answers)


@cache
def trained_tokens(kind: str) -> float:
    """Tokens of a row of an offline dataset that go through the loss: of all turns, or of both answers."""
    columns = {"sft_train": ["messages"], "unpaired_train": ["completion"], "right": ["chosen"]}
    names = columns.get(kind, ["chosen", "rejected"])
    rows = rows_of("preference_train" if kind == "right" else kind)
    said = [[turn for name in names for turn in row[name] if turn["role"] == "assistant"] for row in rows]
    return mean_tokens([[turn["content"] for turn in turns] for turns in said])


# ------------------------------------------------------------------------------------------------------------
# Budget
# ------------------------------------------------------------------------------------------------------------
def steps_for(method: Method, budget: int) -> int:
    """The number of steps, of RFT prompts of a round, of which the tokens are nearest to the budget."""
    offline = method.kind not in ("sampled", "rounds", "answers")
    per_step = method.answers * (trained_tokens(method.kind) if offline else LENGTH)
    round_steps = 10 if "iterative" in method.flags else 1  # whole rounds
    return round(budget / per_step / round_steps) * round_steps


def command_of(name: str, rate: float, seed: int, budget: int) -> str:
    """A run's command but for its folder. But in the search, held-out answers are looked at four times."""
    method, search = METHODS[name], seed == SEARCH_SEED
    steps = steps_for(method, budget)
    flags = f"--max-steps {steps}"
    if name == "dapo":
        flags = f"--max-steps {2 * steps}"  # how much it samples shows as it goes: stopped at the budget
    elif name == "rft":
        flags = f"--prompts-per-round {steps}"
    elif name == "ppo":
        flags += f" --value-learning-rate {3 * rate:g}"  # three times the policy's, as its default
    flags += f" --eval-every {0 if search or name == 'rft' else -(-steps // 3)} --save-every 0 --seed {seed}"
    flags += " --num-eval 8" if search else ""
    given = " ".join(filter(None, (DATA.get(method.script, ONLINE), method.flags)))
    return f"{method.script} {given} --learning-rate {rate:g} {flags}"


def used_tokens(name: str, folder: Path) -> tuple[int, int]:
    """Steps taken and tokens of the budget used, from what a run has written so far."""
    method, path = METHODS[name], folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.open() if line.endswith("}\n")] if path.exists() else []
    steps = [line for line in lines if line["step"]]
    tokens = 0.0
    if method.kind == "sampled":  # prompts since the line before x answers of each x their mean length
        for before, line in zip([{"epoch": 0}, *steps], steps):
            asked = (line["epoch"] - before["epoch"]) * NUM_PROMPTS
            tokens += asked * method.group * line.get("completions/mean_length", 0)
    elif method.kind == "rounds":
        rows = [json.loads(line) for path in folder.glob("round_*.jsonl") for line in path.open()]
        tokens = sum(len(row["completion_ids"]) for row in rows)
    elif method.kind == "answers" and steps:
        answers = [json.loads(line)["completion"] for line in (folder / "answers.jsonl").open()]
        tokens = len(steps) * method.answers * mean_tokens([[text] for text in answers])
    elif steps:
        tokens = len(steps) * method.answers * trained_tokens(method.kind)
    return len(steps), round(tokens)
