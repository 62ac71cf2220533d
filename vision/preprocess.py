"""The preprocessing worker: `python -m vision.preprocess FD` runs the model's own image processor until the Unix socket FD closes.

A process of its own because resizing and tiling takes the interpreter for long, and because it needs torch, which the server does without.
Its first frame holds the settings. Imported by the server for the messages; torch is loaded by the worker alone.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from vision.frames import Failure, Frame, send_frame, serve_frames
from vision.geometry import View
from vision.image import ImageOptions, MediaError
from vision.shared_array import SharedArray
from vision.worker_start import start_worker

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

DEFAULT_PROCESSOR = "vision.processor:ImagePreprocessor"  # module:class


class PreprocessSettings(msgspec.Struct, frozen=True):
    model_folder: str
    trust_remote_code: bool = False
    processor: str = DEFAULT_PROCESSOR


class PreprocessInfo(msgspec.Struct, frozen=True):
    """The worker's answer when it is ready."""

    fingerprint: str  # of all settings that change pixels


class PreprocessJob(msgspec.Struct, frozen=True):
    """What is asked about one picture: with its pixels beside the frame to process it, else to measure one of this size."""

    options: ImageOptions
    size: tuple[int, int] | None = None  # (height, width)
    max_tokens: int | None = None  # a picture of more is refused, before it is resized where the request says how large it is to be


class PreprocessResult(msgspec.Struct, frozen=True):
    num_tokens: int
    layout: dict[str, Any]
    views: tuple[View, ...] = ()  # of a picture that was processed, see `ProcessedImage`


class Preprocessor(Protocol):
    """What the worker asks of the model's side."""

    fingerprint: str

    def process(self, pixels: Array, options: ImageOptions) -> tuple[dict[str, Array], dict[str, Any], int]:
        """Pixels `(height, width, 3)` uint8 → encoder inputs by name, layout, number of tokens."""

    def views(self, size: tuple[int, int], options: ImageOptions, pixel_values: Array, layout: dict[str, Any]) -> Sequence[View]:
        """Where in the picture the pixels lie that `process` gave."""

    def measure(self, size: tuple[int, int], options: ImageOptions) -> tuple[dict[str, Any], int]:
        """(height, width) → layout and number of tokens."""


def main(fd: int) -> None:
    connection, settings = start_worker(fd, PreprocessSettings)
    try:
        preprocessor = _load(settings)
    except Exception as error:
        logger.exception("the image processor could not be loaded")
        send_frame(connection, Frame(failure=Failure("processor_not_loaded", f"{type(error).__name__}: {error}")))
        return
    send_frame(connection, Frame(msgspec.msgpack.encode(PreprocessInfo(preprocessor.fingerprint))))
    serve_frames(connection, lambda request: _answer(preprocessor, request))


def _load(settings: PreprocessSettings) -> Preprocessor:
    import torch

    torch.set_num_threads(1)
    module, _, name = settings.processor.partition(":")
    preprocessor: Preprocessor = getattr(importlib.import_module(module), name)(
        settings.model_folder, trust_remote_code=settings.trust_remote_code
    )
    return preprocessor


def _answer(preprocessor: Preprocessor, request: Frame) -> Frame:
    job = msgspec.msgpack.decode(request.body, type=PreprocessJob)
    height, width = job.size or request.arrays["pixels"].shape[:2]
    try:
        if job.size:
            arrays: dict[str, Array] = {}
            layout, num_tokens = preprocessor.measure(job.size, job.options)
            result = PreprocessResult(num_tokens, layout)
        else:
            if job.max_tokens is not None and job.options.may_enlarge:
                _check_tokens(preprocessor.measure((height, width), job.options)[1], job.max_tokens)
            arrays, layout, num_tokens = preprocessor.process(request.arrays["pixels"].numpy(), job.options)
            _check_tokens(num_tokens, job.max_tokens)
            views = preprocessor.views((height, width), job.options, arrays["pixel_values"], layout)
            result = PreprocessResult(num_tokens, layout, tuple(views))
        return Frame(msgspec.msgpack.encode(result), {name: SharedArray.copy_of(values) for name, values in arrays.items()})
    except MediaError as error:
        return Frame(failure=Failure(error.code, error.message, error.status))
    except ValueError as error:  # how processors refuse odd shapes; their texts are not for clients
        logger.info("a picture of %d × %d pixels is refused: %s", width, height, error)
        return Frame(failure=Failure("image_preprocess_failed", f"the model does not take a picture of {width} × {height} pixels"))
    except Exception:
        logger.exception("the image processor failed")
        return Frame(failure=Failure("image_preprocess_failed", "the model's image processor failed at the picture", 500))


def _check_tokens(num_tokens: int, max_tokens: int | None) -> None:
    if max_tokens is not None and num_tokens > max_tokens:
        message = f"the picture has {num_tokens} tokens; at most {max_tokens} fit into a prompt (--session-len)"
        raise MediaError("context_length_exceeded", message)


if __name__ == "__main__":
    main(int(sys.argv[1]))
