"""Training and evaluation batches for the language model: scenes become prefixes, their questions become turns packed into rows.

Knows nothing of weights or losses; the image tokens are left out, only their slots are marked.
"""

import random
import re
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer

from assets.demo_model.assemble import END_ID, IMAGE_TOKEN, NUM_IMAGE_TOKENS
from assets.demo_model.language import Layout
from assets.demo_model.questions import Question, questions_about
from assets.demo_model.scenes import Scene
from assets.demo_model.text_prompts import Exchange, chat

SYSTEM = "You answer questions about drawn pictures in one short sentence."
OTHER_SYSTEMS = ("You are a helpful assistant.", "You are a helpful AI assistant.", "Answer briefly.")
NUM_ROWS, ROW_LENGTH = 2, 96

# How many questions of a task one scene gives at most, and which task comes first. Relations are learned last.
MAX_OF_TASK = {"relation": 8}
FIRST_TASKS = ("relation", "relation", "relation", "describe")
NEXT_TURN = "\n<|im_start|>user\n"


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids (B, P) and (B, R, L), the slots of image tokens (B, P), the answer tokens (B, R, L), and what sees what.

    `turn_ids` (B, R, L) numbers the questions through the batch, -1 elsewhere; `tasks` names each of them.
    """

    prefix_ids: torch.Tensor
    row_ids: torch.Tensor
    is_image: torch.Tensor
    is_answer: torch.Tensor
    turn_ids: torch.Tensor
    tasks: list[str]
    layout: Layout


@dataclass(slots=True)
class Row:
    """One row while it fills: parallel lists, one entry a token. `segments` says which chat a token belongs to."""

    ids: list[int]
    answers: list[bool]
    turns: list[int]
    segments: list[int]
    positions: list[int]
    sees_prefix: bool = True


class Packer:
    """Packs scenes and text exchanges into batches of one fixed shape."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = cache(lambda string: tokenizer.encode(string).ids)
        self.prefix_length = len(self._prefix(SYSTEM))

    def pack(self, scenes: list[Scene], rng: random.Random, *, texts: tuple[Exchange, ...] = (), is_evaluation: bool = False) -> Batch:
        """One batch; each text exchange takes the last row of one scene."""
        tasks: list[str] = []
        prefixes, rows = [], []
        for i, scene in enumerate(scenes):
            system = SYSTEM if is_evaluation or rng.random() < 0.85 else rng.choice(OTHER_SYSTEMS)
            prefixes.append(self._prefix(system))
            first_task = "describe" if is_evaluation else rng.choice(FIRST_TASKS)
            questions = _chosen(questions_about(scene, rng, is_evaluation=is_evaluation), first_task)
            num_rows = NUM_ROWS - (i < len(texts))
            own_rows = [self._row_of_questions(questions, tasks, rng, is_evaluation=is_evaluation) for _ in range(num_rows)]
            rows.append(own_rows + [self._row_of_text(texts[i]) for _ in range(NUM_ROWS - num_rows)])
        return self._batch(prefixes, rows, tasks)

    def _prefix(self, system: str) -> list[int]:
        opening = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        return self.encode(f"{opening}{IMAGE_TOKEN * NUM_IMAGE_TOKENS}\n")

    def _row_of_questions(self, questions: list[Question], tasks: list[str], rng: random.Random, *, is_evaluation: bool) -> Row:
        """Take questions that still fit, from the front; one in four joins the chat of the one before it."""
        row = Row([], [], [], [], [])
        segment = -1
        for question in list(questions):
            joins = segment >= 0 and not is_evaluation and rng.random() < 0.25
            prompt = self.encode((NEXT_TURN if joins else "") + question.prompt + "<|im_end|>\n<|im_start|>assistant\n")
            answer = self._spelled(f"{question.answer}<|im_end|>")
            if len(row.ids) + len(prompt) + len(answer) > ROW_LENGTH:
                continue
            questions.remove(question)
            segment += not joins
            start = row.positions[-1] + 1 if joins else self.prefix_length
            _append(row, prompt, answer, segment, start, turn=len(tasks))
            tasks.append(question.task)
        return row

    def _spelled(self, answer: str) -> list[int]:
        """The answer's tokens, printed words letter by letter: that is how the tower reads them, whatever word it is."""
        parts = re.split(r"(?<= )([A-Z]{2,})", answer)
        return [token for i, part in enumerate(parts) for piece in (part if i % 2 else [part]) for token in self.encode(piece)]

    def _row_of_text(self, exchange: Exchange) -> Row:
        prompt = self.encode(chat(exchange.prompt))
        answer = self.encode(exchange.answer + ("<|im_end|>" if exchange.is_whole else ""))[: ROW_LENGTH - len(prompt)]
        row = Row([], [], [], [], [], sees_prefix=False)
        _append(row, prompt, answer, 0, 0, turn=-1)
        return row

    def _batch(self, prefixes: list[list[int]], rows: list[list[Row]], tasks: list[str]) -> Batch:
        length = self.prefix_length
        prefix_ids = torch.tensor([[END_ID] * (length - len(ids)) + ids for ids in prefixes])
        padding = torch.tensor([length - len(ids) for ids in prefixes])
        image_id = self.encode(IMAGE_TOKEN)[0]

        def grid(field: str, empty: int) -> torch.Tensor:
            return torch.tensor([[_padded(getattr(row, field), empty) for row in own] for own in rows])

        segments = grid("segments", -1)
        sees_prefix = torch.tensor([[row.sees_prefix for row in own] for own in rows])
        is_token = torch.arange(length) >= padding[:, None]
        layout = Layout(
            prefix_positions=torch.arange(length).expand(len(rows), -1),
            row_positions=grid("positions", 0),
            prefix_mask=torch.ones(length, length, dtype=torch.bool).tril() & is_token[:, None],
            past_mask=(is_token[:, None] & sees_prefix[..., None])[:, :, None].expand(-1, -1, ROW_LENGTH, -1),
            own_mask=(segments[..., None] == segments[..., None, :]) & torch.ones(ROW_LENGTH, ROW_LENGTH, dtype=torch.bool).tril(),
        )
        return Batch(
            prefix_ids, grid("ids", END_ID), prefix_ids == image_id, grid("answers", 0).bool(), grid("turns", -1), tasks, layout
        )  # fmt: skip


def _chosen(questions: list[Question], first_task: str) -> list[Question]:
    """One task first, then the others in their random order, few of those that scenes with many things have many of."""
    seen: dict[str, int] = {}
    chosen = []
    for question in sorted(questions, key=lambda q: q.task != first_task):
        seen[question.task] = seen.get(question.task, 0) + 1
        if seen[question.task] <= MAX_OF_TASK.get(question.task, 1):
            chosen.append(question)
    return chosen


def _append(row: Row, prompt: list[int], answer: list[int], segment: int, start: int, *, turn: int) -> None:
    num_tokens = len(prompt) + len(answer)
    row.ids += prompt + answer
    row.answers += [False] * len(prompt) + [True] * len(answer)
    row.turns += [-1] * len(prompt) + [turn] * len(answer)
    row.segments += [segment] * num_tokens
    row.positions += range(start, start + num_tokens)


def _padded(values: list, empty: int) -> list:
    return values + [empty] * (ROW_LENGTH - len(values))
