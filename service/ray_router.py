"""How Ray Serve's proxies and handles find the replica that has a session."""

from asyncio import TimerHandle
from collections.abc import Collection, Sequence
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter, _hash_bytes

HOLD_S = 5.0


class SessionRouter(ConsistentHashRouter):
    """Hashes `X-Session-Id` consistently, and never to another replica for want of room.

    A session moves only when its replica is gone, or by the share of one more:

    - While Ray gives a replica another `user_config` it leaves it out of what it tells routers,
      though it serves: its sessions would begin anew elsewhere, and come back to states that are
      steps behind. One that is left out stays for `hold_s`, an argument of the configuration.
    - One that died goes at once. Its sessions would wait until the controller finds out, and all
      others behind them.
    - The one that Ray starts in its stead takes its place on the ring, and nobody else's: replicas
      are hashed by the place they say they were given, and not by their names.
    """

    def initialize_state(self, *, hold_s: float = HOLD_S, **options: Any) -> None:
        super().initialize_state(**{"num_fallback_replicas": 0, **options})
        self._hold_s = hold_s
        self._held: dict[Any, TimerHandle] = {}

    def update_replicas(self, replicas: Sequence[Any]) -> None:
        told = {replica.replica_id for replica in replicas}
        taken = {_place(replica) for replica in replicas}
        left_out = [
            replica
            for replica_id, replica in self.curr_replicas.items()
            if replica_id not in told and _place(replica) not in taken
        ]
        held = {replica.replica_id for replica in left_out}
        for replica_id in self._held.keys() - held:
            self._held.pop(replica_id).cancel()
        for replica_id in held - self._held.keys():
            self._held[replica_id] = self._event_loop.call_later(
                self._hold_s, self._drop, replica_id
            )
        super().update_replicas([*replicas, *left_out])

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._drop(replica_id)

    def _drop(self, replica_id: Any) -> None:
        if replica_id in self._held:
            self._held.pop(replica_id).cancel()
        others = [r for r in self.curr_replicas.values() if r.replica_id != replica_id]
        super().update_replicas(others)

    def _rebuild_ring(self, new_snapshot: Collection[Any]) -> None:
        names: dict[str, Any] = {}
        # Ranks of replicas that serve change when there are fewer: two may say the same place.
        for replica in sorted(self.curr_replicas.values(), key=_age):
            place = _place(replica)
            name = replica.replica_id.unique_id if place in names else place
            names[name] = replica.replica_id
        ring = sorted(
            (_hash_bytes(f"{name}:{number}".encode()), name)
            for name in names
            for number in range(self._num_virtual_nodes)
        )
        self._ring_hashes = [point for point, _ in ring]
        self._ring_replicas = [names[name] for _, name in ring]
        self._replica_set_snapshot = frozenset(new_snapshot)


def _place(replica: Any) -> str:
    return f"place-{replica.replica_metadata['place']}"


def _age(replica: Any) -> tuple[float, str]:
    return replica.replica_metadata["since_s"], replica.replica_id.unique_id
