"""Text prompts and the original SmolLM2's greedy answers to them: what must not change while the model learns to see.

Held-out prompts use subjects that no training prompt has. The answers are generated once and kept in a file.
Knows nothing of pictures.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from assets.demo_model.assemble import language_config, language_weights

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MAX_ANSWER_TOKENS = 72
NUM_TRAINING, NUM_HELD_OUT = 640, 200

SUBJECTS = tuple(
    """the moon|photosynthesis|the French Revolution|bread|a bicycle|gravity|the Pacific Ocean|chess|volcanoes|the heart
    |recycling|coffee|the printing press|whales|solar energy|jazz music|the Roman Empire|honey bees|email|vaccines
    |the Great Wall of China|tea|dinosaurs|earthquakes|football|the internet|mountains|paper|sleep|rainbows
    |democracy|money|libraries|the Sahara|computers|wolves|bridges|cheese|trains|the human brain
    |elephants|winter|the piano|cities|clouds|robots|gardening|rivers|penguins|magnets
    |the Olympic Games|salt|friendship|glass|airplanes|owls|tides|cooking rice|kindness|maps
    |electric cars|poetry|teeth|deserts|Mars|public transport|storytelling|ants|swimming|clocks""".replace("\n", "").split("|")
)
TEMPLATES = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "Give me three facts about {}.",
    "Why do people care about {}?",
    "Write one sentence about {}.",
    "What is the history of {}?",
    "List some words that have to do with {}.",
    "Write a title for an essay about {}.",
    "How would you describe {} to a friend?",
    "What question should I ask an expert on {}?",
)
SUMS = ("What is {} plus {}?", "Add {} and {}.", "What is {} times {}?", "I have {} apples and buy {} more. How many do I have?")
HELD_OUT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Exchange:
    """One prompt with the original model's greedy answer; `is_whole` if the answer ended by itself."""

    prompt: str
    answer: str
    is_whole: bool


def prompts(seed: int) -> tuple[list[str], list[str]]:
    """Training prompts and held-out prompts, all different."""
    rng = random.Random(seed)
    subjects = [subject.strip() for subject in SUBJECTS]
    rng.shuffle(subjects)
    cut = int(len(subjects) * HELD_OUT_SHARE)
    held_out = [template.format(subject) for template in TEMPLATES for subject in subjects[:cut]]
    training = [template.format(subject) for template in TEMPLATES for subject in subjects[cut:]]
    for i in range(60):
        template = rng.choice(SUMS)
        (held_out if i % 4 == 0 else training).append(template.format(rng.randrange(2, 10) + 10 * i, rng.randrange(2, 90)))
    return rng.sample(training, NUM_TRAINING), rng.sample(sorted(set(held_out)), NUM_HELD_OUT)


def chat(prompt: str) -> str:
    """The prompt as the chat template renders it."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def load_or_generate(path: Path, gguf_path: Path, tokenizer: Tokenizer, *, seed: int) -> tuple[list[Exchange], list[Exchange]]:
    """Training and held-out exchanges; asks the original model when `path` does not exist yet, which takes some minutes."""
    if not path.exists():
        model = original_model(gguf_path)
        groups = [_answer_all(group, model, tokenizer) for group in prompts(seed)]
        path.write_text(json.dumps([[asdict(exchange) for exchange in group] for group in groups], indent=1))
    training, held_out = json.loads(path.read_text())
    return [Exchange(**e) for e in training], [Exchange(**e) for e in held_out]


def original_model(gguf_path: Path) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct as it is in the GGUF file, in float32."""
    model = LlamaForCausalLM(LlamaConfig(**language_config(gguf_path)))
    model.load_state_dict(dict(language_weights(gguf_path)), strict=False)
    return model.eval()


def _answer_all(group: list[str], model: LlamaForCausalLM, tokenizer: Tokenizer, batch: int = 32) -> list[Exchange]:
    by_length = sorted(group, key=lambda prompt: len(tokenizer.encode(chat(prompt)).ids))
    return [exchange for i in range(0, len(group), batch) for exchange in _answer(by_length[i : i + batch], model, tokenizer)]


@torch.no_grad()
def _answer(batch: list[str], model: LlamaForCausalLM, tokenizer: Tokenizer) -> list[Exchange]:
    """Greedy answers to a batch of prompts, padded on the left."""
    rows = [tokenizer.encode(chat(prompt)).ids for prompt in batch]
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=2)
    answers = [row.tolist() for row in out[:, width:]]
    return [Exchange(prompt, tokenizer.decode(row), 2 in row) for prompt, row in zip(batch, answers, strict=True)]
