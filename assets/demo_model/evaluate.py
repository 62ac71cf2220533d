"""Asks a model about held-out scenes and says whether it reaches the thresholds; exit code 1 if it misses one.

The model is a running OpenAI-compatible server (`--url`) or, for development, a folder run through the reference library
(`--folder`, which also measures the perplexity of the original's text answers). Half the scenes are drawn by each renderer; the
phrasings are those that training never uses.
"""

import argparse
import asyncio
import base64
import io
import json
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image

import vision  # noqa: F401  torchvision needs it on builds without its own operators
from assets.demo_model.questions import Question, is_right, questions_about
from assets.demo_model.scenes import Scene, render, sample_scene
from assets.demo_model.second_renderer import render_second

FIRST_SEED = 1_000_000_000
MAX_TOKENS = 80
RENDERERS: dict[str, Callable[[Scene], Image.Image]] = {"first": render, "second": render_second}

# Smallest share of right answers on the first renderer; the second may fall short of the same by `SECOND_SLACK`.
THRESHOLDS = {"object": 0.97, "count": 0.95, "place": 0.90, "relation": 0.80, "number": 0.85, "describe": 0.85}
SECOND_SLACK = 0.10


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one rendered scene. `measure` is the row of the table that it counts for."""

    measure: str
    renderer: str
    scene: Scene
    question: Question


@dataclass(frozen=True, slots=True)
class Figure:
    """A share of right answers with the number of answers behind it."""

    measure: str
    renderer: str
    share: float
    num_answers: int
    threshold: float | None

    @property
    def is_reached(self) -> bool:
        return self.threshold is None or self.share >= self.threshold


def items(num_scenes: int, first_seed: int = FIRST_SEED) -> list[Item]:
    """The questions about `num_scenes` scenes per kind of scene taken in turn, alternating between the renderers."""
    plain, printed = {"with_text": False}, {"with_text": True}
    kinds = ({"num_things": 1} | plain, {"num_things": 2} | plain, plain, printed, printed)
    chosen: list[Item] = []
    for i in range(num_scenes):
        scene = sample_scene(first_seed + i, **kinds[i // 2 % len(kinds)])
        renderer = ("first", "second")[i % 2]
        questions = questions_about(scene, random.Random(scene.seed), is_evaluation=True)
        chosen += [Item(measure, renderer, scene, question) for measure, question in _measured(scene, questions)]
    return chosen


def _measured(scene: Scene, questions: list[Question]) -> Iterable[tuple[str, Question]]:
    """One question of each task (the first, as they are in random order) with the measure that it counts for."""
    seen: set[str] = set()
    is_single = len(scene.things) == 1 and not scene.text
    for question in questions:
        if question.task in seen:
            continue
        seen.add(question.task)
        if question.task == "describe" and is_single:
            yield "object", question
        if question.task == "text":
            yield _text_measure(scene), question
        elif question.task != "relation" or len(scene.things) == 2:
            yield question.task, question


def _text_measure(scene: Scene) -> str:
    if scene.text is None:
        return "no text"
    if not scene.text.string.isdigit():
        return "word"
    return "number" if len(scene.text.string) == 3 else "other number"


def figures(chosen: list[Item], answers: list[str]) -> list[Figure]:
    """Shares per measure and renderer, in a fixed order."""
    hits: dict[tuple[str, str], list[bool]] = {}
    for item, answer in zip(chosen, answers, strict=True):
        hits.setdefault((item.measure, item.renderer), []).append(_is_hit(item, answer))
    return [
        Figure(measure, renderer, sum(right) / len(right), len(right), _threshold(measure, renderer))
        for (measure, renderer), right in sorted(hits.items())
    ]


def _threshold(measure: str, renderer: str) -> float | None:
    if measure not in THRESHOLDS:
        return None
    return THRESHOLDS[measure] - (SECOND_SLACK if renderer == "second" else 0.0)


async def ask_server(url: str, model: str | None, chosen: list[Item], concurrency: int) -> list[str]:
    """Greedy answers from `POST {url}/v1/chat/completions`, at most `concurrency` at a time, in the order of the items."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        name = model or (await client.get("/v1/models")).json()["data"][0]["id"]

        async def ask(item: Item) -> str:
            async with gate:
                reply = await client.post("/v1/chat/completions", json=_request(name, item))
            reply.raise_for_status()
            return reply.json()["choices"][0]["message"]["content"]

        return await asyncio.gather(*map(ask, chosen))


def _request(model: str, item: Item) -> dict[str, object]:
    buffer = io.BytesIO()
    RENDERERS[item.renderer](item.scene).save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "text", "text": item.question.prompt}, {"type": "image_url", "image_url": {"url": address}}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "temperature": 0}


def ask_folder(folder: Path, chosen: list[Item], batch: int = 16) -> list[str]:
    """The same through the reference library, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[str] = []
    for i in range(0, len(chosen), batch):
        part = chosen[i : i + batch]
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question.prompt}]}] for item in part]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        pictures = [RENDERERS[item.renderer](item.scene) for item in part]
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=MAX_TOKENS)
        answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def text_perplexity(folder: Path, exchanges: list[dict[str, object]]) -> float:
    """Perplexity of given answers to text prompts; `exchanges` is the held-out part of the training's text file."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from assets.demo_model.text_prompts import chat

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    total, num_tokens = 0.0, 0
    for exchange in exchanges:
        prompt = tokenizer(chat(str(exchange["prompt"])), add_special_tokens=False).input_ids
        answer = tokenizer(str(exchange["answer"]) + ("<|im_end|>" if exchange["is_whole"] else ""), add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        num_tokens += len(answer)
    return math.exp(total / num_tokens)


def table(results: list[Figure]) -> str:
    lines = ["| measure | renderer | right | answers | threshold | |", "|---|---|---|---|---|---|"]
    for f in results:
        wanted = "" if f.threshold is None else f"{f.threshold:.0%}"
        lines.append(f"| {f.measure} | {f.renderer} | {f.share:.1%} | {f.num_answers} | {wanted} | {'' if f.is_reached else 'missed'} |")
    return "\n".join(lines)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a running server, such as http://127.0.0.1:23333")
    where.add_argument("--folder", type=Path, help="a model folder, run through the reference library")
    parser.add_argument("--model", help="the served model's name (default: the first that the server lists)")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument(
        "--first-seed", type=int, default=FIRST_SEED, help=f"of the scenes; other held-out ones with another (default: {FIRST_SEED})"
    )
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--text", type=Path, help="with --folder: the text file of the training, for the perplexity of its held-out part")
    parser.add_argument("--json", type=Path, help="write the figures and every wrong answer here")
    options = parser.parse_args()
    chosen = items(options.scenes, options.first_seed)
    if options.url:
        answers = asyncio.run(ask_server(options.url, options.model, chosen, options.concurrency))
    else:
        answers = ask_folder(options.folder, chosen)
    results = figures(chosen, answers)
    print(table(results))
    if options.text:
        print(f"text perplexity {text_perplexity(options.folder, json.loads(options.text.read_text())[1]):.4f}")
    if options.json:
        options.json.write_text(json.dumps(_report(results, chosen, answers), indent=1, ensure_ascii=False))
    return 0 if all(figure.is_reached for figure in results) else 1


def _report(results: list[Figure], chosen: list[Item], answers: list[str]) -> dict[str, object]:
    shares = [{"measure": f.measure, "renderer": f.renderer, "share": f.share, "answers": f.num_answers} for f in results]
    wrong = [_wrong(item, answer) for item, answer in zip(chosen, answers, strict=True) if not _is_hit(item, answer)]
    return {"figures": shares, "is_reached": all(f.is_reached for f in results), "wrong": wrong}


def _is_hit(item: Item, answer: str) -> bool:
    return is_right(item.question.task, answer, item.question.answer)


def _wrong(item: Item, answer: str) -> dict[str, object]:
    asked = {"question": item.question.prompt, "right": item.question.answer, "answer": answer}
    return {"measure": item.measure, "renderer": item.renderer, "seed": item.scene.seed} | asked


if __name__ == "__main__":
    sys.exit(_main())
