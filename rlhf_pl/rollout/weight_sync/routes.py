"""The ways of the weights to servers: to each by itself, or to all that NCCL has joined."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from torch import Tensor

from rlhf_pl.distributed.addresses import resolve
from rlhf_pl.rollout.background import at_once, start
from rlhf_pl.rollout.fleet import Fleet
from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.rollout.weight_sync.transports import Push
from rlhf_pl.utils.errors import InputError

Bucket = list[tuple[str, Tensor]]


class WeightRoute:
    """Servers that get their weights together; what fails for one of them fails for all.

    Args:
        engines: The servers.
        make_push: Makes the way to their workers.
        address: Where the servers reach this process.
    """

    def __init__(self, engines: Sequence[ServedEngine], make_push: Callable[[], Push], address: str) -> None:
        self.engines, self._make_push, self.address = list(engines), make_push, address
        self._push: Push | None = None

    @property
    def is_connected(self) -> bool:
        return self._push is not None

    def holds(self, version: str | None) -> bool:
        """Whether all servers have the weights of a version; None for any."""
        try:
            return version is None or all(engine.weight_version() == version for engine in self.engines)
        except ServerError:
            return False

    def connect(self) -> None:
        """Bring all workers here.

        Raises:
            InputError: They do not come.
        """
        self.close()
        try:
            push = self._push = self._make_push()
        except OSError as error:
            raise InputError(
                f"`rollout.sampler.address`: can't listen at {self.address}: {error.strerror or error}. The servers' "
                "workers must reach the trainer at an address of this host; give one."
            ) from error
        known_as = resolve(self.address)
        place = self.address if known_as == self.address else f"{self.address} ({known_as})"
        counts = [engine.workers() for engine in self.engines]
        told: list[Future[Any]] = []
        for number, engine in enumerate(self.engines):
            info = push.init_info(sum(counts[:number]), sum(counts))
            told.append(start(engine.call, "/init_weight_transfer_engine", {"init_info": info}))

        def failed() -> None:
            for call in told:
                if call.done() and (error := call.exception()) is not None:
                    raise InputError(
                        f"`rollout.sampler`: {error} Its workers must reach the trainer at {place}; set "
                        "rollout.sampler.address to one that they can, and see the server's log."
                    ) from error

        try:
            push.connect(sum(counts), failed)
            for call in told:
                call.result()
        except OSError as error:
            self.close()
            failed()
            raise InputError(
                f"`rollout.sampler`: not all workers of the servers came to the trainer at {place}: {error}. Set "
                "rollout.sampler.address to an address of this host that they can reach, and see the servers' logs."
            ) from error
        except BaseException as error:
            self.close()
            if isinstance(error, ServerError):
                failed()
            raise

    def open(self) -> None:
        """Begin an update; answers that are under way come first."""
        self._all("/pause?mode=wait")
        at_once(_start_update, self.engines)

    def send(self, bucket: Bucket) -> None:
        """A bucket of weights: described over HTTP, while the bytes go by the push."""
        assert self._push is not None
        info = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
            "shapes": [list(t.shape) for _, t in bucket],
        }
        telling = start(self._all, "/update_weights", {"update_info": info})
        try:
            self._push.send([t for _, t in bucket])
        except OSError as error:
            wait([telling], 10)
            if telling.done():
                telling.result()  # the server's own words, if it has some
            raise InputError(
                f"`rollout.sampler`: the connection for weights broke: {error}. See the servers' logs."
            ) from error
        telling.result()

    def finish(self, version: str) -> None:
        """End the update, and let answers be drawn."""
        self._all("/finish_weight_update", {"weight_version": version})
        self._all("/reset_prefix_cache")
        self._all("/resume")

    def close(self) -> None:
        if self._push is not None:
            self._push.close()
            self._push = None

    def _all(self, path: str, body: Any = None) -> None:
        """The same call to every server, at once."""
        at_once(lambda engine: engine.call(path, body), self.engines)


def _start_update(engine: ServedEngine) -> None:
    try:
        engine.call("/start_weight_update")
    except ServerError as error:
        if error.status is None:
            raise
        engine.call("/finish_weight_update")  # a trainer that was killed has left an update open
        engine.call("/start_weight_update")


class WeightRoutes:
    """The ways to a fleet. A server that can't be given weights is lost, until it can.

    Args:
        fleet: The servers.
        routes: The ways to all of them.
    """

    def __init__(self, fleet: Fleet, routes: Sequence[WeightRoute]) -> None:
        self.fleet, self._routes = fleet, list(routes)

    def connect(self, vet: Callable[[ServedEngine], None], version: str | None) -> None:
        """Bring those workers here that are not: of servers that were lost, or started anew.

        Args:
            vet: Raises InputError for a server that can't be used.
            version: Of the weights that the others hold; None before the first update.

        Raises:
            InputError: No server can be used.
        """

        def connect(route: WeightRoute) -> None:
            if not route.is_connected or not route.holds(version):
                for engine in route.engines:
                    vet(engine)
                route.connect()
            self.fleet.take_back(route.engines)

        self._each(self._routes, connect)

    def each(self, action: Callable[[WeightRoute], None]) -> None:
        """Act on every way at once; the servers of one that fails are lost.

        Raises:
            InputError: None is left.
        """
        self._each([route for route in self._routes if route.is_connected], action)

    def close(self) -> None:
        for route in self._routes:
            route.close()

    def _each(self, routes: Sequence[WeightRoute], action: Callable[[WeightRoute], None]) -> None:
        def attempt(route: WeightRoute) -> None:
            try:
                action(route)
            except InputError as error:
                route.close()
                self.fleet.lose(route.engines, error)

        at_once(attempt, routes)
        self.fleet.require_one()
