"""Which weights serve, which did before, and the way from one to the next while `/act` answers."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple

from export.loaders.protocol import RenewableStep
from export.manifest import ArtifactError, Manifest
from export.parameters import Parameters, first_difference, sha256, value_unit
from service.engine.batcher import Batcher
from service.engine.probe import Probe
from service.engine.sessions import SessionTable
from service.engine.stepper import Stepper
from service.errors import (
    Invalid,
    NoPreviousVersion,
    PushConflict,
    ServiceError,
    VersionMismatch,
    short,
)
from service.runtime.protocol import DeviceLost, Runtime

logger = logging.getLogger(__name__)

MOST_LISTED = 16
OF_AN_EXPORT = {"name", "value_scale"}
"""What of a spec is an export's own; the weights have the value's scale."""


class Push(NamedTuple):
    """New weights, and what their owner's policy did with them, to be read once these are known to
    be this policy's."""

    parameters: Parameters
    read_probe: Callable[[], Probe]


class Successor(NamedTuple):
    """Another artifact, and what loads its step once it is known to be this policy's."""

    manifest: Manifest
    load: Callable[[], RenewableStep]


class Change(NamedTuple):
    """What changed which weights serve."""

    policy_version: str
    previous_version: str | None
    probe_error: float | None


class PolicyVersion(NamedTuple):
    """What is told of weights that serve or did: since when, and how near they came to their probe.

    The artifact's own have none.
    """

    policy_version: str
    since: datetime
    probe_error: float | None


class Weights(NamedTuple):
    """What serves, or can: `parameters` are those that were pushed, None the artifact's own."""

    policy_version: str
    loaded: RenewableStep
    parameters: Parameters | None = None
    probe_error: float | None = None

    def listed(self) -> PolicyVersion:
        """As it is told of from now on."""
        return PolicyVersion(self.policy_version, datetime.now(UTC), self.probe_error)


class _Built(NamedTuple):
    weights: Weights
    adopt: Callable[[], None]
    probe_error: float | None


class PolicyVersions:
    """Changes what `runtime` runs, one change at a time, between two batches.

    `observe` is told how each ended, ok or an error's type, and the seconds it took until the new
    weights served. On the event loop; weights are built and probed beside it.
    """

    def __init__(
        self,
        manifest: Manifest,
        first: Weights,
        *,
        runtime: Runtime,
        batcher: Batcher,
        stepper: Stepper,
        sessions: SessionTable,
        observe: Callable[[str, float], None],
    ) -> None:
        self.current = first
        self.previous: Weights | None = None
        self._listed = deque([first.listed()], maxlen=MOST_LISTED)
        self._manifest = manifest
        self._runtime = runtime
        self._batcher = batcher
        self._stepper = stepper
        self._sessions = sessions
        self._observe = observe
        self._is_changing = False
        self._beside = ThreadPoolExecutor(1, "weights")

    @property
    def listed(self) -> list[PolicyVersion]:
        """Those that served last, the newest first."""
        return list(reversed(self._listed))

    def is_changing(self) -> bool:
        """Whether weights are being built or probed now."""
        return self._is_changing

    def check_idle(self) -> None:
        """Raises PushConflict while weights are being changed."""
        if self._is_changing:
            self._observe(PushConflict.error_type, 0.0)
            raise PushConflict("other weights are being checked just now; try again")

    def resume(
        self, policy_version: str, parameters: Parameters, probe_error: float | None
    ) -> None:
        """Has weights serve that were pushed to a server before this one; its probe is not kept.

        Before anything is served. The way back leads to the artifact's own. Raises Invalid where
        they are not this policy's.
        """
        self._check(parameters)
        loaded = self._loaded(parameters)
        self._runtime.prepare(loaded)()
        self._stepper.policy_version = policy_version
        self.previous = self.current
        self.current = Weights(policy_version, loaded, parameters, probe_error)
        self._listed = deque([self.current.listed()], maxlen=MOST_LISTED)

    async def push(
        self,
        read: Callable[[], Push],
        *,
        if_match: Collection[str] | None,
        restarts_sessions: bool,
        by: str,
    ) -> Change:
        """Has the weights that `read` gives serve, once they do what their probe says.

        Raises PushConflict while others are being checked, VersionMismatch where `if_match` is not
        the version that serves (nor these weights do already), what `read` does, and Invalid,
        naming the parameter or the number, where they are not this policy's or not the probe's:
        then nothing has changed. Draining where the device is lost, as all changes do.
        """
        return await self._changed(
            lambda: self._built(read(), if_match), restarts_sessions, by, "pushed"
        )

    async def succeed(self, open_artifact: Callable[[], Successor], *, by: str) -> Change:
        """Has another artifact's weights serve, whose export held them against their policy.

        Raises PushConflict as `push` does, and Invalid where it cannot be opened or is another
        policy's, naming what differs: then nothing has changed.
        """
        return await self._changed(lambda: self._built_from(open_artifact), False, by, "changed to")

    async def rollback(
        self, *, if_match: Collection[str] | None, restarts_sessions: bool, by: str
    ) -> Change:
        """Has the version before the one that serves serve again. The way back leads once.

        Raises NoPreviousVersion where there is none, PushConflict and VersionMismatch as `push`
        does.
        """
        return await self._changed(
            lambda: self._built_again(if_match), restarts_sessions, by, "rolled back to"
        )

    async def _changed(
        self, build: Callable[[], _Built], restarts_sessions: bool, by: str, what: str
    ) -> Change:
        self.check_idle()
        self._is_changing = True
        # To its end, whether or not somebody waits for it still.
        self._changing = asyncio.ensure_future(self._change(build, restarts_sessions, by, what))
        self._changing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._changing)

    async def _change(
        self, build: Callable[[], _Built], restarts_sessions: bool, by: str, what: str
    ) -> Change:
        began_s = time.perf_counter()
        result = "internal"
        try:
            loop = asyncio.get_running_loop()
            built = await loop.run_in_executor(self._beside, build)
            changed: asyncio.Future[Change] = loop.create_future()
            self._batcher.between(lambda: self._settle(changed, built, restarts_sessions))
            change = await changed
            result = "ok"
        except ServiceError as error:
            result = error.error_type
            logger.warning("weights of %s refused: %s", by, error)
            raise
        except DeviceLost as error:
            logger.exception("weights of %s found the device lost", by)
            refusal = self._batcher.refusal(error)
            result = refusal.error_type
            raise refusal from error
        finally:
            self._is_changing = False
            self._observe(result, time.perf_counter() - began_s)
        logger.info("%s %s by %s", what, change.policy_version[:19], by)
        return change

    def _settle(
        self, changed: "asyncio.Future[Change]", built: _Built, restarts_sessions: bool
    ) -> None:
        """Between two batches, which go on if a device fails to take it, and end if it is lost."""
        try:
            changed.set_result(self._serve(built, restarts_sessions))
        except Exception as error:
            self._batcher.refusal(error)  # before another batch is launched
            changed.set_exception(error)

    def _serve(self, built: _Built, restarts_sessions: bool) -> Change:
        weights, adopt, probe_error = built
        if weights is not self.current:
            adopt()
            self._stepper.policy_version = weights.policy_version
            self.previous = None if weights is self.previous else self.current
            self.current = weights
            self._listed.append(weights.listed())
        if restarts_sessions:
            self._sessions.restart()
        previous = None if self.previous is None else self.previous.policy_version
        return Change(weights.policy_version, previous, probe_error)

    def _built(self, push: Push, if_match: Collection[str] | None) -> _Built:
        """What is to serve, all of it that can be done while another does."""
        parameters = push.parameters
        self._check(parameters)
        name = f"sha256:{sha256(parameters)}"
        is_current = name == self.current.policy_version
        if not is_current:  # or it is asked for again, as its answer was lost
            self._check_match(if_match)
        loaded = self._loaded(parameters)
        probe_error = push.read_probe().error(loaded, self._manifest, unit=value_unit(parameters))
        if is_current:
            return _Built(self.current, _nothing, probe_error)
        weights = Weights(name, loaded, parameters, probe_error)
        return _Built(weights, self._runtime.prepare(loaded), probe_error)

    def _built_again(self, if_match: Collection[str] | None) -> _Built:
        self._check_match(if_match)
        if self.previous is None:
            raise NoPreviousVersion("there is no version before this one to go back to")
        adopt = self._runtime.prepare(self.previous.loaded)
        return _Built(self.previous, adopt, self.previous.probe_error)

    def _built_from(self, open_artifact: Callable[[], Successor]) -> _Built:
        try:
            successor = open_artifact()
            self._check_policy(successor.manifest)
            name = successor.manifest.policy_version
            if name == self.current.policy_version:
                return _Built(self.current, _nothing, None)
            loaded = successor.load()
        except ArtifactError as error:
            raise Invalid(str(error)) from error
        return _Built(Weights(name, loaded), self._runtime.prepare(loaded), None)

    def _check_policy(self, manifest: Manifest) -> None:
        """Raises Invalid where an artifact is not of this policy, naming the first that differs."""
        served = _rules(self._manifest)
        for name, other in _rules(manifest).items():
            if other != served[name]:
                raise Invalid(
                    f"this is another policy's artifact: its {name} is {short(str(other))}, and "
                    f"that of the policy that serves {short(str(served[name]))}"
                )
        checked, needed = manifest.max_batch_size, self._manifest.max_batch_size
        if checked < needed:
            raise Invalid(
                f"this artifact was checked with batches up to {checked}, and the one that serves "
                f"with up to {needed}: export it again with as many"
            )

    def _check(self, parameters: Parameters) -> None:
        """Raises Invalid where they are not this policy's, naming the first that differs."""
        expected = self._manifest.parameters
        if not expected:
            raise Invalid(
                "this artifact takes no weights: it was exported before it could name its "
                "parameters; export it again"
            )
        difference = first_difference(parameters, expected)
        if difference is not None:
            raise Invalid(f"`{short(difference.name)}` {difference.what}")

    def _loaded(self, parameters: Parameters) -> RenewableStep:
        try:
            return self.current.loaded.with_parameters(parameters)
        except ArtifactError as error:
            raise Invalid(f"{error}; serve the artifact with another runtime") from error

    def _check_match(self, if_match: Collection[str] | None) -> None:
        serves = self.current.policy_version
        if if_match is not None and {"*", serves}.isdisjoint(if_match):
            asked = ", ".join(filter(None, if_match)) or "a version without a name"
            raise VersionMismatch(f"{serves} serves, not {short(asked)}")


def _rules(manifest: Manifest) -> dict[str, Any]:
    """What two artifacts of one policy have in common, whatever their weights are."""
    rules = manifest.spec.model_dump(mode="json", exclude=OF_AN_EXPORT)
    parameters = {p.name: (p.dtype, p.shape) for p in manifest.parameters}
    return {"family": "tamiyo", **rules, "precision": manifest.precision, "parameters": parameters}


def _nothing() -> None:
    """There is nothing to adopt."""
