"""The engine: text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, overload

import torch
from torch import Tensor

from skvq.engine import scoring
from skvq.engine.absorb import pack_zeros
from skvq.engine.batch import Batch
from skvq.engine.cache import SequenceCache
from skvq.engine.calibration import calibrate_to
from skvq.engine.codecs import layouts_of
from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.errors import CapacityError, OptionError
from skvq.engine.generation import answered, continued
from skvq.engine.guard import computes, own_settings
from skvq.engine.likelihoods import Likelihoods
from skvq.engine.load_options import LoadOptions
from skvq.engine.loading import EngineParts, load_parts, with_cache
from skvq.engine.machine import pick_device, pick_dtype
from skvq.engine.options import names_options, path_of, path_or_none, require_type
from skvq.engine.pieces import Pieces, finished
from skvq.engine.prompt import ChatIds, Ids, Prompt, is_several, template_kwargs_of
from skvq.engine.report import Quiet, Reporter, StderrReporter
from skvq.engine.timing import Timing
from skvq.engine.token_engine import TokenEngine
from skvq.loaders.artifact import ArtifactHeader


class Engine(TokenEngine):
    """A model, its arena and its tokenizer. Build one with ``Engine.load``."""

    def __init__(self, parts: EngineParts, report: Reporter, *, prefix_cache: bool = True) -> None:
        super().__init__(parts, report, prefix_cache=prefix_cache)
        self._one_batch, self._batching = Lock(), 0  # the thread that has a batch open

    @classmethod
    @names_options(cache=CacheConfig)
    def load(
        cls,
        model: str | Path,
        *,
        max_context: int | None = None,
        max_sequences: int = 4,
        total_tokens: int | None = None,
        cache: CacheConfig | None = None,
        backend: str = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        calibration: str | Path | None = None,
        dummy_weights: bool = False,
        rope_scaling: str | None = None,
        prefill: str = "exact",
        on_full: str = "stop",
        prefix_cache: bool = True,
        cuda_graph: bool = True,
        download: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        report: Reporter | None = None,
    ) -> Engine:
        """Load a model and allocate its arena.

        model: an alias, a folder with config.json and safetensors, a .gguf file, or of the hub ``org/name``, or
            ``org/name:Q4_K_M``, its GGUF file of that name.
        max_context: tokens of the longest sequence; the default is the trained length, or what fits.
        max_sequences: sequences alive at once; each has a full window of its own.
        total_tokens: that they hold together, pages they share counted once; the default is max_context and, for each sequence
            beyond the first, a few pages.
        calibration: an artifact of ``skvq calibrate``; the default is a cached one, or one made now.
        rope_scaling: ``kind:factor`` to go past the trained context: ``chunks:4`` (dual chunk attention), ``yarn:4``,
            ``dynamic:4``, ``linear:4``; ``yarn:4:32768`` stretches another length, as Qwen3's authors say.
        prefill: how prompts are read, ``exact`` or ``streaming``.
        on_full: what happens when a sequence reaches max_context: ``stop`` ends its answer, ``shift`` drops its oldest packed
            pages, all but the attention sinks, and goes on. A prompt longer than max_context is then read by streaming.
        prefix_cache: a prompt that begins like an earlier one of this engine takes over its whole pages (1,280 tokens each)
            while they are still there, and only the rest is read, by streaming. The rest then sees the beginning as it is
            packed, as the next turn of a conversation does; without, every prompt is read whole, as ``prefill`` says.
        cuda_graph: replay the decode step as one graph, a CUDA graph or on the CPU a tape of launches; without, its kernels
            are launched one by one.
        chat_template_kwargs: what the model's chat template is given besides messages, as ``{"enable_thinking": False}``.

        Raises SkvqError for whatever a user can mend; a context that does not fit is refused before anything is allocated.
        """
        require_type("cache", cache, CacheConfig, None)
        require_type("prefix_cache", prefix_cache, bool)
        require_type("report", report, Reporter, None)
        if isinstance(report, type):
            raise OptionError(f"report must be an object with bar and message, got the class {report.__name__}: call it")
        reporter = report if report is not None else StderrReporter()
        options = LoadOptions(
            model=str(model),
            max_context=max_context,
            max_sequences=max_sequences,
            total_tokens=total_tokens,
            cache=cache if cache is not None else CacheConfig(),
            backend=backend,
            device=(chosen := pick_device(device)),
            dtype=pick_dtype(dtype, chosen),
            calibration=path_or_none("calibration", calibration),
            dummy_weights=dummy_weights,
            rope_scaling=rope_scaling,
            prefill=prefill,
            on_full=on_full,
            cuda_graph=cuda_graph,
            download=download,
            chat_template_kwargs=template_kwargs_of(chat_template_kwargs),
        )
        with own_settings(options.device):
            engine = cls(load_parts(options, reporter), Quiet(), prefix_cache=prefix_cache)
            engine.warm_up()
            engine.report, engine.timing = reporter, Timing()
            return engine

    @names_options(cache=CacheConfig)
    @computes
    def with_cache(self, cache: CacheConfig, *, calibration: str | Path | None = None, max_sequences: int = 1) -> Engine:
        """An engine with another cache over the same weights; free this one's arena by dropping it."""
        require_type("cache", cache, CacheConfig)
        path = path_or_none("calibration", calibration)
        parts = with_cache(self.parts, cache, max_sequences, path, self.report)
        return Engine(parts, self.report, prefix_cache=self.prefix_cache)

    @computes
    def warm_up(self) -> None:
        """Read and decode a token, and pack a tile: compiling kernels and capturing the step are part of nobody's timing."""
        with self.new_sequence() as sequence:
            self.read(sequence, [0])
            if self.parts.setup.max_context > 1:
                self.decode_step([sequence], [0])
            if self.parts.cache.is_packed:
                pack_zeros(sequence, layouts_of(self.parts.cache, self.parts.model.config))

    # --- text ------------------------------------------------------------------------------------------------------------

    @names_options(sampling=SamplingConfig)
    def stream(
        self,
        text: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        sequence: SequenceCache | None = None,
        checkpoint: str | Path | None = None,
    ) -> Generator[str, None, None]:
        """Pieces of the answer to a text, to token ids or to chat messages, as they are drawn; whole characters only.

        With ``sequence`` the prompt continues it, and the sequence holds the answer afterwards (its last token is ``pending``
        until more is read); an empty text goes on from its last token; chat messages are the next of its conversation, after
        the end of the assistant's turn. Without, one is made and freed. A stop string is left out of the pieces, but the tokens
        that spell it stay in the sequence. Arguments are checked at once; work begins with the first piece. ``checkpoint`` as
        for ``read``.
        """
        config, file = self.sampling_of(sampling), path_or_none("checkpoint", checkpoint)
        ids = self.encode_after(text, sequence)
        if sequence is not None:
            return continued(self, sequence, ids, config, file, after=sequence.mark)
        return answered(self, ids, config, file)

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, text: Prompt, sampling: SamplingConfig | None = None, *, sequence: SequenceCache | None = None
    ) -> str: ...

    @overload
    def generate(
        self, text: Sequence[Prompt], sampling: SamplingConfig | None = None, *, sequence: SequenceCache | None = None
    ) -> list[str]: ...

    @names_options(sampling=SamplingConfig)
    def generate(
        self,
        text: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        *,
        sequence: SequenceCache | None = None,
    ) -> str | list[str]:
        """The answer to a prompt (as for ``stream``), or to each of a list of prompts.

        These are answered together, as many at a time as there are free sequences and pages for; when one ends the next begins.
        With ``sequence`` each continues a fork of it, which shares its pages: many questions about one text.
        """
        if not is_several(text):
            return "".join(self.stream(text, sampling, sequence=sequence))  # type: ignore[arg-type]
        with self.batch(interleaved=False) as batch:
            requests = [batch.add(one, sampling, sequence=sequence, fork=sequence is not None) for one in text]
            while len(batch):
                batch.step()
        return [request.text for request in requests]

    @names_options()
    @contextmanager
    def batch(self, *, interleaved: bool = True) -> Iterator[Batch]:
        """Answers written together, to prompts that may come while others are being answered: what a server needs.

        interleaved: the others go on while a long prompt is read, by a token for each piece of it; without, they wait.

        One batch is open at a time: another thread that wants one, or gives ``generate`` a list, waits until this one is
        closed, at the end of its ``with`` block. Answers that are not over are cancelled then.
        """
        require_type("interleaved", interleaved, bool)
        if self._batching == get_ident():
            raise OptionError("this thread has a batch open: add the prompts to that, or close it first")
        with self._one_batch:
            self._batching, batch = get_ident(), Batch(self, interleaved=interleaved)
            try:
                yield batch
            finally:
                try:
                    batch.close()
                finally:
                    self._batching, self.timing = 0, batch.timing

    @names_options(sampling=SamplingConfig)
    def chat(self, messages: Sequence[Mapping[str, Any]], sampling: SamplingConfig | None = None) -> str:
        """The assistant's answer to a conversation ``[{"role": ..., "content": ...}, ...]``; ``stream`` takes one too."""
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise OptionError(f"a chat is a list of messages with 'role' and 'content', not {type(messages).__name__}")
        return "".join(self.stream(ChatIds(self.parts.tokenizer.encode_chat(messages)), sampling))

    # --- scores --------------------------------------------------------------------------------------------------------------

    @names_options()
    @computes
    def logits(self, token_ids: Ids) -> Tensor:
        """Teacher-forced logits float32 [N, V] in full precision: what the cache is measured against."""
        parts, ids = self.parts, self.encode(token_ids)
        if len(ids) > parts.setup.max_context:
            raise CapacityError(f"{len(ids):,} tokens do not fit a context of {parts.setup.max_context:,}")
        logits = 4 * len(ids) * parts.model.config.vocab_size
        return parts.model.head(scoring.dense_hidden(parts, parts.model.ids(ids), more=logits))

    @names_options()
    @computes
    def nll(self, token_ids: Ids) -> Tensor:
        """Negative log-likelihood float32 [N - 1] of each next token, every position seeing what decode would see."""
        return scoring.nll(self.parts, self.encode(token_ids), self.report)

    @names_options()
    @computes
    def likelihoods(self, token_ids: Ids, count: int = 1) -> Likelihoods:
        """Log probabilities after each token, of the next and of the ``count`` likeliest, positions seeing what decode sees."""
        return finished(self.scoring(token_ids, count))

    def scoring(self, token_ids: Ids, count: int = 1) -> Pieces[Likelihoods]:
        """``likelihoods`` in pieces, each to be done while the engine computes (``guard.computing``)."""
        return scoring.likelihoods(self.parts, self.encode(token_ids), count, self.report)

    @names_options()
    @computes
    def evaluate(
        self,
        text: str,
        caches: Sequence[CacheConfig],
        *,
        tokens: int,
        stride: int,
        calibration: str | Path | None = None,
        exact_window: bool = False,
    ) -> list[dict[str, Any]]:
        """Measure caches against full precision on the first ``tokens`` of a text, in stretches of ``stride`` tokens.

        One dict a cache: name, method, key_bits and value_bits (means over layers), bits_budget, layer_bits, group_size,
        window, bits_per_element, ppl_fp, ppl, kl (nats per token), top1, tokens, by_position. ``exact_window`` holds exactly W
        recent tokens, as papers simulate.
        """
        require_type("text", text, str)
        require_type("exact_window", exact_window, bool)
        return scoring.evaluate(
            self.parts,
            text,
            caches,
            self.report,
            tokens=tokens,
            stride=stride,
            calibration=path_or_none("calibration", calibration),
            exact_window=exact_window,
        )

    @names_options()
    @computes
    def calibrate(
        self, cache: CacheConfig, corpus: str, output: str | Path, *, corpus_name: str, tokens: int, seed: int = 0
    ) -> ArtifactHeader:
        """Make a calibration for ``cache`` from a text and write it to ``output``; the header says what it is for."""
        require_type("cache", cache, CacheConfig)
        require_type("corpus", corpus, str)
        require_type("corpus_name", corpus_name, str)
        return calibrate_to(
            path_of("output", output), self.parts.loaded, cache, corpus,
            corpus_name=corpus_name, tokens=tokens, seed=seed, report=self.report,
        )  # fmt: skip
