"""One policy being served: codec, sessions, engine and batcher, joined."""

import asyncio
import time
from collections.abc import Sequence

from export.manifest import Manifest, bucket_sizes
from service.act import ActCodec
from service.batcher import Batcher
from service.engine import Engine, StepAnswer, StepRequest, derived_seed
from service.errors import NotReady, ServiceError
from service.exchange import Exchange
from service.metrics import Metrics
from service.runtime.protocol import Runtime
from service.sessions import SessionTable
from service.settings import Settings


class PolicyService:
    """Answers `POST /act` bodies with one artifact's policy. Made on the event loop it serves."""

    def __init__(self, manifest: Manifest, runtime: Runtime, settings: Settings) -> None:
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

    def start(self) -> None:
        """Runs every bucket off the event loop; `/act` opens when all have."""
        self.warming = asyncio.ensure_future(asyncio.to_thread(self.engine.warm_up))

    async def stop(self) -> None:
        """Answers everything that waits, then takes nothing more."""
        await self.batcher.drain()

    def check_ready(self) -> None:
        """Raises NotReady until the warm-up has ended well."""
        warming = self.warming
        if warming is None or not warming.done() or warming.exception() is not None:
            raise NotReady("the policy is still warming up")

    def check_open(self) -> None:
        """Raises what a request would meet now, whatever is in it: then it need not be read."""
        self.check_ready()
        self.batcher.check_room()

    def act(self, body: bytes | bytearray, exchange: Exchange) -> None:
        """Has `exchange` answered or refused: at once, or when its batch has run."""
        try:
            self.check_open()
            request, timeout_ms = self.codec.parse(body)
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
