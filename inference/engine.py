"""The engine: every request's fate from its prompt to its last character, one step at a time.

`step` is schedule → batch → forward → sample → commit → text; with `overlap` the next step is scheduled, and the last
one's tokens go to their callers, while a step is computed. It owns scheduler, blocks, KV cache and model; one thread
uses it (`AsyncEngine` gives it one of its own).
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from .. import RequestError, TurnoutError
from ..moe.config import ModelConfig
from ..moe.models.decoder import Decoder
from ..moe.models.store import load_model, tokenizer_directory
from .choice import Choice
from .compiling import Compiling
from .config import EngineConfig
from .core.blocks import BlockManager
from .core.gauge import Histogram, TimeMean
from .core.replicas import Replicas
from .core.request import Request
from .core.sampling import SamplingParams
from .core.step import StepPlan
from .errors import QueueTimeoutError, StepError
from .faults import no_token, probe, step_error
from .ledger import Ledger
from .machine import Machine
from .outputs import RequestOutput
from .prepare import Prepared, Prompt, admissible, check_ids
from .ranks import Ranks
from .rehearsal import FIRST_TOKENS, rehearse
from .run.executor import StepResult
from .run.runner import compile_kernels
from .run.sampler import Sampled
from .stages import Stages
from .stats import GAUGES, STEP_TOKENS, EngineStats
from .text.chat import ChatTemplate
from .text.grammar import GrammarCompiler
from .text.tokenizer import TextTokenizer
from .timeline import Timeline

T = TypeVar("T")
IDLE_SECONDS = 0.01
"""The longest pause between two looks at whether anything can be scheduled."""


class Engine:
    """Continuous batching over one model.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        config: limits and sizes; what it leaves open is resolved here.
        chat: the model's chat template; None = a plain transcript.
        clock: seconds, for time in the queue.
        ranks: those that compute together; `model` is then this one's part. None = this process computes alone.

    Attributes:
        config: resolved: `max_model_len` and `num_blocks` are numbers.
        memory_plan: what weights, the worst step and the KV cache take.
        kv_plan: how large the KV cache is and why.
        timeline: the last steps, while somebody watches.

    Raises:
        ConfigError: settings that do not fit the model or the memory.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: TextTokenizer,
        config: EngineConfig,
        chat: ChatTemplate | None = None,
        clock: Callable[[], float] = time.monotonic,
        ranks: Ranks | None = None,
    ) -> None:
        machine = Machine(model, config, clock, ranks)
        self.config, self.memory_plan, self.kv_plan = machine.config, machine.memory, machine.memory.kv
        self.model_config: ModelConfig = model.cfg
        self.tokenizer = tokenizer
        self.chat = chat or ChatTemplate(tokenizer)
        self.runner, self.blocks, self.scheduler = machine.runner, machine.blocks, machine.scheduler
        self.ranks = ranks
        self._executor = machine.executor
        self._plans: deque[StepPlan] = deque()
        """Launched, not committed; the executor has them in the same order."""
        self._compiling = Compiling(GrammarCompiler(tokenizer, model.cfg.vocab_size, config.grammar_timeout))
        no_rows, shares = self.runner.pages.no_rows, self.blocks.shares
        self._ledger = Ledger(model.cfg, tokenizer, config.seed, shares=shares, no_rows=no_rows)
        self._clock = clock
        self._steps = 0
        self._computed_tokens = 0
        self._step_tokens = Histogram(STEP_TOKENS)
        self._utilisation = TimeMean()
        self.timeline = Timeline(clock)

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        device: str | torch.device | None = None,
        ranks: Ranks | None = None,
        stages: Stages | None = None,
    ) -> "Engine":
        """Load a model.

        Args:
            path: as `load_model` has it.
            config: the engine's settings.
            device: None = the GPU if there is one; with `ranks` it is theirs.
            ranks: those that compute together.
            stages: is told when weights, kernels and the KV cache are there.

        Raises:
            CheckpointError, DataError: files are missing or broken. ConfigError: settings do not fit.
        """
        config = config or EngineConfig()
        with tokenizer_directory(path) as directory:
            tokenizer = TextTokenizer.from_dir(directory)
            chat = ChatTemplate.from_dir(directory, tokenizer)
        if ranks is not None:
            model = ranks.load(path, config.dtype)
        else:
            model = load_model(path, config.dtype, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        (stages := stages or Stages()).done("weights")
        compile_kernels(model.device, config.form)
        stages.done("kernels")
        engine = cls(model, tokenizer, config, chat, ranks=ranks)
        stages.done("KV cache")
        return engine

    def warm_up(self) -> None:
        """Compute a prefill and a decode, uncounted: the first request finds kernels compiled and memory touched."""
        rehearse(self._executor, self.scheduler, self.config, self.model_config)
        self.runner.cache.populate(FIRST_TOKENS)
        self.runner.forget()

    @property
    def has_unfinished(self) -> bool:
        """There are requests, or steps to be committed."""
        return bool(self._ledger or self._plans)

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        *,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> Prepared:
        """Tokenise and check a request without touching the engine's state; any thread may call it.

        Args:
            priority: lower is served earlier; within one priority first come, first served.
            deadline: seconds from its arrival by which it must have started, or it expires.
            cache_salt: cached prefixes are shared only between requests of one salt (a tenant's name, say).

        Raises:
            RequestError: token ids outside the vocabulary, text that is not valid Unicode, or what the model can not
            do.
        """
        check_ids("prompt", () if isinstance(prompt, str) else prompt, self.model_config.vocab_size)
        if params.routed_experts and not self.runner.pages.layers:
            rule = "needs a decoder with experts, which this model does not have: leave it out"
            raise RequestError(f"routed_experts (True) {rule}", "routed_experts")
        if self.ranks is not None:
            self.ranks.admit(params)
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Prepared(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=tuple(ids),
            params=admissible(params, self.tokenizer, self.model_config),
            priority=priority,
            deadline=deadline,
            cache_salt=cache_salt,
        )

    def add(self, prepared: Prepared) -> None:
        """Queue a prepared request, all of its choices or none.

        Raises:
            RequestError: it can never run, or its id is taken. QueueFullError: too many wait.
        """
        requests = self._ledger.requests(prepared, self._clock())
        wanted = prepared.params.structured_outputs
        self.scheduler.add(*requests, held=wanted is not None)
        self._ledger.enter(prepared, requests)
        if wanted is not None:
            self._compiling.add(prepared.request_id, wanted, requests)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        *,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> None:
        """`prepare` and `add` in one."""
        self.add(self.prepare(request_id, prompt, params, priority, deadline=deadline, cache_salt=cache_salt))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request wherever it stands and return its last output; None when it is not (or no longer) known."""
        return self._end(request_id) if request_id in self._ledger else None

    @property
    def pools(self) -> list[BlockManager]:
        """The blocks of every replica."""
        scheduler = self.scheduler
        replicas = scheduler.schedulers if isinstance(scheduler, Replicas) else (scheduler,)
        return [replica.blocks for replica in replicas]

    def abort_all(self) -> list[RequestOutput]:
        """End every request."""
        return [self._end(request_id) for request_id in list(self._ledger)]

    def close(self) -> None:
        """End every request, the thread that computes steps, and the processes that compile grammars."""
        self.abort_all()
        self._executor.discard()
        self._plans.clear()
        self.timeline.discarded()
        self.scheduler.discard()
        self._executor.close()
        self._compiling.close()

    def step(self) -> list[RequestOutput]:
        """Finish one step and return the new state of every request that it changed."""
        refused = [self._end(name, error) for name, error in self._compiling.take(self.scheduler)]
        if not self._plans:
            self._launch(self.scheduler.schedule())
        if self._executor.overlaps:
            self._launch(self.scheduler.schedule_ahead())
        try:
            result = self._executor.collect()
        except Exception as error:
            if self.ranks is not None:
                raise  # the others may wait in an exchange of this step
            return refused + self._blame(error)
        plan = self._plans.popleft()
        if not plan.num_tokens and self.has_unfinished:
            self._compiling.rest(min(max(self.scheduler.patience, 0.0), IDLE_SECONDS))
        return refused + self._commit(plan, result)

    def _launch(self, plan: StepPlan | None) -> None:
        if plan is not None:
            if plan.scheduled:
                self._steps += 1
                self._computed_tokens += plan.num_tokens
                self._step_tokens.add(plan.num_tokens)
            self._plans.append(plan)
            self.timeline.launched()
            self._executor.launch(plan)

    def _commit(self, plan: StepPlan, results: StepResult) -> list[RequestOutput]:
        """Apply a step's results."""
        sampled = results.sampled
        failed = self._expired(plan) | self._hand(results.routed, Choice.report)
        failed |= self._hand(results.prompts, Choice.score)
        for request_id, result in sampled.items():
            if request_id not in self._ledger.choices:
                continue  # it was ended after the launch
            if result.token is None:
                stuck = self._ledger.choices[request_id]
                failed[stuck.request_id] = no_token(stuck.request, result.excluded)
        for request_id, found in results.prompts.items():
            choice = self._ledger.choices.get(request_id)
            if choice is not None and None in found.tokens:
                failed[choice.request_id] = no_token(choice.request, excluded=False)
        ended = [self._end(name, error) for name, error in failed.items()]
        tokens = {request_id: result.token for request_id, result in sampled.items() if result.token is not None}
        advanced: dict[str, StepError | None] = {}
        now = self._clock()
        for request in self.scheduler.commit(plan, tokens):
            name, error = self._advance(request, sampled.get(request.id), now)
            advanced[name] = advanced.get(name) or error
        stats = self.scheduler.stats()
        self._utilisation.note(stats.kv_utilisation, now)
        self.timeline.committed(plan, stats, now)
        return ended + [self._end(name, e) if e else self._output(name) for name, e in advanced.items()]

    def _hand(self, results: Mapping[str, T], give: Callable[[Choice, T], None]) -> dict[str, TurnoutError]:
        """Give live choices what a step has for them; what that raises fails their requests alone."""
        failed: dict[str, TurnoutError] = {}
        for request_id, result in results.items():
            choice = self._ledger.choices.get(request_id)
            if choice is not None:
                try:
                    give(choice, result)
                except Exception as cause:  # noqa: BLE001  (the others' results are not its affair)
                    failed[choice.request_id] = step_error(cause)
        return failed

    def _expired(self, plan: StepPlan) -> dict[str, TurnoutError]:
        rule = "the request was not started before its deadline or queue_timeout: try again later"
        choices = (self._ledger.choices.get(request.id) for request in plan.expired)
        return {choice.request_id: QueueTimeoutError(rule) for choice in choices if choice is not None}

    def _blame(self, error: Exception) -> list[RequestOutput]:
        """A step raised. Its requests run again, each alone until it has caught up; one that did so already has failed.

        Raises:
            Exception: not even the simplest step can be computed, so the engine is at fault.
        """
        plans = list(self._plans)
        self._plans.clear()
        self._executor.discard()
        self.timeline.discarded()
        guilty = {item.request.id for plan in plans for item in plan.scheduled if item.request.suspect}
        suspects = self.scheduler.discard()
        self._launch(probe(self.model_config.encoder is not None))
        self._plans.clear()
        self.timeline.discarded()
        self._executor.collect()
        failed = self._expired(plans[0])
        for request in suspects:
            if request.id in guilty:
                failed[self._ledger.choices[request.id].request_id] = step_error(error)
        return [self._end(name, e) for name, e in failed.items()]

    def stats(self) -> EngineStats:
        """Gauges and counters as they stand."""
        stats = self.scheduler.stats()
        return EngineStats(
            **{name: getattr(stats, name) for name in GAUGES},
            kv_utilisation_mean=self._utilisation.mean,
            steps=self._steps,
            step_tokens=self._step_tokens.copy(),
            computed_tokens=self._computed_tokens,
            routing=self.runner.totals(idle=not self.has_unfinished),
            all_to_all_bytes=self.runner.sent_bytes,
        )

    def _advance(self, request: Request, result: Sampled | None, now: float) -> tuple[str, StepError | None]:
        """Hand a committed token to its choice, and its stop string back to the scheduler; None = it wanted none.

        Returns:
            The caller's request id, and what its text raised.
        """
        choice, error = self._ledger.choices[request.id], None
        try:
            if result is None:
                choice.finish("length")
            else:
                request.first_token, request.last_token = request.first_token or now, now
                choice.advance(request.token_ids[-1], result.logprobs, request.finish_reason)
        except Exception as cause:  # noqa: BLE001  (the others' texts are not its affair)
            choice.finish_reason, error = "abort", step_error(cause)
        if choice.finish_reason is not None:
            self.scheduler.finish(request.id, choice.finish_reason)  # without effect when the scheduler ended it
        return choice.request_id, error

    def _end(self, request_id: str, error: TurnoutError | None = None) -> RequestOutput:
        """Abort what still runs of a request, for `error` or because its caller wants it."""
        for choice in self._ledger.choices_of(request_id):
            self.scheduler.abort(choice.request.id)
            choice.finish("abort")
        return self._output(request_id, error)

    def _output(self, request_id: str, error: TurnoutError | None = None) -> RequestOutput:
        """The request's state for its caller; a finished request is forgotten."""
        output = self._ledger.output(request_id, error)
        if output.finished:
            self._compiling.drop(request_id)
        return output
