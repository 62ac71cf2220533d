"""What the routes of one app share: settings, backend, sampling defaults, metrics. Built by the lifespan, read from the app's state."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request

from engine.request import EngineDeadError, EngineInfo, InvalidRequestError, Prompt
from vlm_server.aborting import NO_SESSION, AbortSwitch, RunningRequests, switch_of
from vlm_server.answer_formats import AnswerFormats
from vlm_server.auth import tenant_of
from vlm_server.backend import Backend
from vlm_server.config import ServerConfig
from vlm_server.detokenizer import StopWords, TextDecoder
from vlm_server.embedding_protocol import EmbeddingsRequest
from vlm_server.errors import ApiError
from vlm_server.field_rules import check_fields
from vlm_server.files import Files
from vlm_server.generation import Generation
from vlm_server.interactive_protocol import GenerateRequest
from vlm_server.metrics import Metrics
from vlm_server.middleware import request_facts
from vlm_server.parsing.answer import AnswerParser
from vlm_server.protocol import GenerationFields
from vlm_server.request_limits import check_limits
from vlm_server.responses.records import ResponseRecords
from vlm_server.responses.request import CreateResponse
from vlm_server.sampling import SamplingDefaults, sampling_params
from vlm_server.token_protocol import TokenRequest
from vlm_server.turns import Turns


@dataclass(frozen=True, slots=True)
class ServerContext:
    config: ServerConfig
    backend: Backend
    defaults: SamplingDefaults
    metrics: Metrics
    turns: Turns
    formats: AnswerFormats
    files: Files
    responses: ResponseRecords
    created_s: int  # Unix time of the start
    running: RunningRequests | None = None  # None without --enable-abort-handling

    @property
    def engine_info(self) -> EngineInfo:
        """Raises EngineDeadError before the engine was ready once."""
        if self.backend.engine.info is None:
            raise EngineDeadError("the engine is starting")
        return self.backend.engine.info

    def accept(
        self, request: Request, body: GenerationFields | EmbeddingsRequest | GenerateRequest | TokenRequest | CreateResponse
    ) -> list[str]:
        """The warnings for a request that we can serve. Raises ApiError 404 or 400."""
        name = self.config.model_name if body.model is None else body.model
        request_facts(request.scope)["model"] = name if name == self.config.model_name else "unknown"
        if name != self.config.model_name:
            message = f"the model {name!r} does not exist; this server has {self.config.model_name!r}"
            raise ApiError(404, "model_not_found", message, param="model")
        check_limits(body, self.config.limits)
        warnings = check_fields(body, strict=self.config.strict_fields)
        if isinstance(body, GenerationFields) and body.session_id not in (None, NO_SESSION) and self.running is None:
            warnings.append("session_id: it has no effect without --enable-abort-handling")
        return warnings

    def abortable(self, request: Request, session_id: int | None) -> AbortSwitch | None:
        """The switch of a request that begins; None without --enable-abort-handling."""
        if self.running is None:
            return None
        switch = switch_of(request.scope)
        self.running.begin(switch, tenant_of(request.scope), session_id)
        return switch

    async def text_prompt(self, text_or_ids: str | list[int], *, tenant: str) -> Prompt:
        """A prompt without a template, tokenized in one of the pipeline's threads. Raises InvalidRequestError."""
        if not isinstance(text_or_ids, str):
            self.check_token_ids(text_or_ids)
        pipeline = self.backend.pipeline
        return await pipeline.in_thread(lambda: pipeline.text_prompt(text_or_ids, tenant=tenant))

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """As the engine does, for those who decode a prompt before it gets there. Raises InvalidRequestError."""
        largest_id = self.engine_info.vocab_size - 1
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) <= largest_id):
            raise InvalidRequestError(f"the prompt holds a token id outside 0 … {largest_id}")

    def generation(
        self,
        body: GenerationFields,
        prompts: list[Prompt],
        *,
        grammar: str | None = None,
        stop_token_ids: Sequence[int] = (),
        request_id: str,
        abort: AbortSwitch | None = None,
        decoder: TextDecoder | None = None,
        new_parser: Callable[[], AnswerParser] | None = None,
    ) -> Generation:
        """All answers to the request, not yet begun.

        stop_token_ids: what ends them beside the request's own. For abort, decoder and new_parser see `Generation`.
        """
        info = self.engine_info
        params = sampling_params(body, self.defaults, num_logprobs=body.num_logprobs, vocab_size=info.vocab_size, grammar=grammar)
        stop_words = StopWords() if body.ignore_eos else self.backend.stop_words
        ends = () if body.ignore_eos else (*stop_words.token_ids, *stop_token_ids)
        ends = tuple(token_id for token_id in ends if token_id < info.vocab_size)
        return Generation(
            self.backend.engine,
            self.backend.pipeline.tokenizer,
            prompts,
            replace(params, stop_token_ids=(*params.stop_token_ids, *ends)),
            body,
            stop_words=stop_words.strings,
            request_id=request_id,
            metrics=self.metrics,
            abort=abort,
            decoder=decoder,
            new_parser=new_parser,
        )


def context_of(request: Request) -> ServerContext:
    context: ServerContext = request.app.state.context
    return context


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s
