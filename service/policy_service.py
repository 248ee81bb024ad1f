"""One policy being served: codec, sessions, engine and batcher, joined."""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from export.loaders.protocol import LoadedStep
from export.manifest import Manifest, bucket_sizes
from service.engine.batcher import Batcher
from service.engine.engine import Engine, StepAnswer, StepRequest, derived_seed
from service.engine.sessions import SessionTable
from service.errors import Malformed, NotReady, ServiceError
from service.http.act import ActCodec
from service.http.exchange import Exchange
from service.metrics import Metrics
from service.settings import Settings


class PolicyService:
    """Answers `POST /act` bodies with one artifact's policy. Made on the event loop it serves."""

    def __init__(self, manifest: Manifest, runtime: LoadedStep, settings: Settings) -> None:
        spec = manifest.spec
        self.manifest = manifest
        self.runtime = runtime
        self.settings = settings
        self.max_batch_size = min(settings.max_batch_size, manifest.max_batch_size)
        self.codec = ActCodec(spec, manifest.policy_version)
        self.sessions = SessionTable(
            spec,
            capacity=settings.max_sessions,
            idle_timeout_s=settings.session_idle_s,
            default_seed=lambda *identity: derived_seed(settings.seed, *identity),
            clock=time.monotonic,
        )
        self.engine = Engine(
            runtime,
            self.sessions,
            spec,
            buckets=bucket_sizes(self.max_batch_size),
            seed=settings.seed,
        )
        self.batcher = Batcher[StepRequest, StepAnswer](
            self._step,
            max_batch_size=self.max_batch_size,
            max_waiting=settings.max_waiting,
        )
        self.metrics = Metrics(self.sessions, lambda: len(self.batcher))
        self.warming: asyncio.Future[None] | None = None
        self._warm_up_thread: threading.Thread | None = None

    def start(self) -> None:
        """Runs every bucket off the event loop; `/act` opens when all have."""
        self.warming = asyncio.get_running_loop().create_future()
        # Not the loop's executor: the loop's end would wait for it, be it a minute.
        self._warm_up_thread = threading.Thread(
            target=self._warm_up, args=(self.warming,), name="warm-up", daemon=True
        )
        self._warm_up_thread.start()

    def _warm_up(self, warming: "asyncio.Future[None]") -> None:
        error: Exception | None = None
        try:
            self.engine.warm_up(is_wanted=lambda: not warming.done())
        except Exception as failure:
            error = failure

        def settle() -> None:
            if warming.cancelled():
                return
            if error is None:
                warming.set_result(None)
            else:
                warming.set_exception(error)

        with suppress(RuntimeError):  # the loop has ended meanwhile, and nobody waits
            warming.get_loop().call_soon_threadsafe(settle)

    async def stop(self) -> None:
        """Answers everything that waits, then takes nothing more."""
        if self.warming is not None:
            self.warming.cancel()
        await self.batcher.drain()

    def is_warming(self) -> bool:
        """Whether a step of the warm-up runs still, wanted or not."""
        return self._warm_up_thread is not None and self._warm_up_thread.is_alive()

    def check_ready(self) -> None:
        """Raises NotReady until the warm-up has ended well."""
        warming = self.warming
        if warming is None or not warming.done() or warming.cancelled() or warming.exception():
            raise NotReady("the policy is still warming up")

    def check_open(self) -> None:
        """Raises what a request would meet now, whatever is in it: then it need not be read."""
        self.check_ready()
        self.batcher.check_room()

    def act(self, body: bytes | bytearray, exchange: Exchange) -> None:
        """Has `exchange`, which was let in, answered or refused: now, or when its batch has run."""
        try:
            request, timeout_ms = self.codec.parse(body)
            if exchange.session_header is not None:
                _check_session(exchange.session_header, request.session_id)
            self._submit(request, (timeout_ms or self.settings.timeout_ms) / 1000, exchange)
        except ServiceError as error:
            exchange.refuse(error)
        except Exception:
            exchange.fail()

    def _submit(self, request: StepRequest, timeout_s: float, exchange: Exchange) -> None:
        session_id = request.session_id

        def settle(answer: StepAnswer | ServiceError) -> None:
            if session_id is not None:
                self.sessions.release(session_id)
            if isinstance(answer, ServiceError):
                exchange.refuse(answer)
                return
            try:
                content = self.codec.write(request, answer)
            except Exception:
                exchange.fail()
            else:
                exchange.answer(content, is_replay=answer.is_replay)

        self.batcher.submit(
            request, settle, is_wanted=exchange.is_wanted, key=session_id, timeout_s=timeout_s
        )
        if session_id is not None:
            self.sessions.hold(session_id)

    def _step(self, requests: list[StepRequest]) -> Sequence[StepAnswer | ServiceError]:
        started_s = time.perf_counter()
        answers = self.engine.step(requests)
        self.metrics.step_seconds.observe(time.perf_counter() - started_s)
        self.metrics.batch_size.observe(len(requests))
        return answers


def _check_session(header: bytes, session_id: str | None) -> None:
    """Raises Malformed where a balancer that went by the header may have come to the wrong server.

    What is not ASCII comes as UTF-8 or as Latin-1, as clients have it.
    """
    if session_id is None or (
        header != session_id.encode() and header.decode("latin-1") != session_id
    ):
        raise Malformed("`X-Session-Id` is not the `session_id` of the body")
