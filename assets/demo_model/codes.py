"""The code between tower and language model: what the image token of a patch should say, in the language model's own words.

A patch that holds the centre of a thing says its size, colour, shape and place as a sum of word embeddings, where it is along
the lines from " left" to " right" and from " above" to " below", its rank in reading order and the number of things; a
character's patch says the character and its index. The tower learns to produce this code while the language model learns to
read it, so both can be trained at once.
"""

import torch
from tokenizers import Tokenizer

from assets.demo_model.labels import HEADS
from assets.demo_model.scenes import CHARACTERS, COLOURS, PLACES, SHAPES, SIZES

COORDINATE_SCALE = 3.0
KIND, SHAPE, COLOUR, SIZE, PLACE, RANK, COUNT, CHARACTER, INDEX = range(len(HEADS))


class PatchCode:
    """Turns the labels of patches into image tokens of the norm of word embeddings."""

    def __init__(self, embedding: torch.Tensor, tokenizer: Tokenizer) -> None:
        def words(names: tuple[str, ...] | str) -> torch.Tensor:
            vectors = [sum(embedding[i].float() for i in tokenizer.encode(name).ids) for name in names]
            return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)

        generator = torch.Generator().manual_seed(7)
        arbitrary = torch.nn.functional.normalize(torch.randn(16, embedding.shape[1], generator=generator), dim=-1)
        self.width = embedding.shape[1]
        self.norm = embedding.float().norm(dim=-1).mean()
        self.tables = {
            KIND: words((".", " shape", " text")),
            SHAPE: words(tuple(f" {shape}" for shape in SHAPES)),
            COLOUR: words(tuple(f" {colour}" for colour in COLOURS)),
            SIZE: words(tuple(f" {size}" for size in SIZES)),
            PLACE: words(tuple(f" {place}" for place in PLACES)),
            RANK: arbitrary[:4],
            COUNT: words("1234"),
            CHARACTER: 1.5 * words(CHARACTERS),
            INDEX: arbitrary[4:10],
        }
        left, right, above, below = words((" left", " right", " above", " below"))
        self.axes = torch.nn.functional.normalize(torch.stack([right - left, below - above]), dim=-1)

    def __call__(self, classes: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        """classes (..., num_heads) int64 with -1 for none, centre (..., 2) → (..., hidden) float32."""
        tokens = sum(torch.where(classes[..., i, None] >= 0, table[classes[..., i].clamp(min=0)], 0.0) for i, table in self.tables.items())
        marked = (classes[..., :1] > 0).float()
        return (tokens + COORDINATE_SCALE * marked * (centre - 0.5) @ self.axes) * self.norm
