"""Routes of the weights to servers: one per server, or one for all servers that NCCL connects."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from torch import Tensor

from rlhf_pl.distributed.addresses import resolve
from rlhf_pl.rollout.background import run_in_thread, run_parallel
from rlhf_pl.rollout.fleet import Fleet
from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.rollout.weight_sync.transports import Push
from rlhf_pl.utils.errors import InputError

Bucket = list[tuple[str, Tensor]]


class WeightRoute:
    """Servers that get their weights together; a failure of one is a failure of all.

    Args:
        engines: The servers.
        make_push: Makes the connections to their workers.
        address: Address at which the servers reach this process.
    """

    def __init__(self, engines: Sequence[ServedEngine], make_push: Callable[[], Push], address: str) -> None:
        self.engines, self._make_push, self.address = list(engines), make_push, address
        self._push: Push | None = None

    @property
    def is_connected(self) -> bool:
        return self._push is not None

    def has_version(self, version: str | None) -> bool:
        """Whether all servers have the weights of a version; None for any."""
        try:
            return version is None or all(engine.get_weight_version() == version for engine in self.engines)
        except ServerError:
            return False

    def connect(self) -> None:
        """Connect all workers to this process.

        Raises:
            InputError: Not all workers connect.
        """
        self.close()
        try:
            push = self._push = self._make_push()
        except OSError as error:
            raise InputError(
                f"`rollout.sampler.address`: can't listen at {self.address}: {error.strerror or error}. The servers' "
                "workers must reach the trainer at an address of this host; set it to one."
            ) from error
        resolved = resolve(self.address)
        where = self.address if resolved == self.address else f"{self.address} ({resolved})"
        counts = [engine.count_workers() for engine in self.engines]
        calls: list[Future[Any]] = []
        for number, engine in enumerate(self.engines):
            info = push.init_info(sum(counts[:number]), sum(counts))
            calls.append(run_in_thread(engine.call, "/init_weight_transfer_engine", {"init_info": info}))

        def check_calls() -> None:
            for call in calls:
                if call.done() and (error := call.exception()) is not None:
                    raise InputError(
                        f"`rollout.sampler`: {error} Its workers must reach the trainer at {where}; set "
                        "rollout.sampler.address to an address that they can reach, and see the server's log."
                    ) from error

        try:
            push.connect(sum(counts), check_calls)
            for call in calls:
                call.result()
        except OSError as error:
            self.close()
            check_calls()
            raise InputError(
                f"`rollout.sampler`: not all workers of the servers connected to the trainer at {where}: {error}. Set "
                "rollout.sampler.address to an address of this host that they can reach, and see the servers' logs."
            ) from error
        except BaseException as error:
            self.close()
            if isinstance(error, ServerError):
                check_calls()
            raise

    def start_update(self) -> None:
        """Start an update, after the requests in progress have finished."""
        self._call_all("/pause?mode=wait")
        run_parallel(_start_update, self.engines)

    def send(self, bucket: Bucket) -> None:
        """Send a bucket of weights: its description over HTTP, its bytes through the push."""
        assert self._push is not None
        info = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
            "shapes": [list(t.shape) for _, t in bucket],
        }
        request = run_in_thread(self._call_all, "/update_weights", {"update_info": info})
        try:
            self._push.send([t for _, t in bucket])
        except OSError as error:
            wait([request], 10)
            if request.done():
                request.result()  # raises the server's own message, if there is one
            raise InputError(
                f"`rollout.sampler`: the connection for weights broke: {error}. See the servers' logs."
            ) from error
        request.result()

    def finish_update(self, version: str) -> None:
        """Finish the update and resume sampling."""
        self._call_all("/finish_weight_update", {"weight_version": version})
        self._call_all("/reset_prefix_cache")
        self._call_all("/resume")

    def close(self) -> None:
        if self._push is not None:
            self._push.close()
            self._push = None

    def _call_all(self, path: str, body: Any = None) -> None:
        """Send the same request to all servers in parallel."""
        run_parallel(lambda engine: engine.call(path, body), self.engines)


def _start_update(engine: ServedEngine) -> None:
    try:
        engine.call("/start_weight_update")
    except ServerError as error:
        if error.status is None:
            raise
        engine.call("/finish_weight_update")  # a killed trainer has left an update unfinished
        engine.call("/start_weight_update")


class WeightRoutes:
    """The routes to a fleet. A server that can't get weights is lost until it can.

    Args:
        fleet: The servers.
        routes: Routes to all of them.
    """

    def __init__(self, fleet: Fleet, routes: Sequence[WeightRoute]) -> None:
        self.fleet, self._routes = fleet, list(routes)

    def connect(self, check: Callable[[ServedEngine], None], version: str | None) -> None:
        """Connect the workers that are not connected: those of servers that were lost or restarted.

        Args:
            check: Raises InputError for a server that can't be used.
            version: Version of the weights that the other servers have; None before the first update.

        Raises:
            InputError: No server can be used.
        """

        def connect(route: WeightRoute) -> None:
            if not route.is_connected or not route.has_version(version):
                for engine in route.engines:
                    check(engine)
                route.connect()
            self.fleet.restore(route.engines)

        self._run(self._routes, connect)

    def run_on_connected(self, action: Callable[[WeightRoute], None]) -> None:
        """Run an action on all connected routes in parallel; the servers of a route that fails are lost.

        Raises:
            InputError: No server is left.
        """
        self._run([route for route in self._routes if route.is_connected], action)

    def close(self) -> None:
        for route in self._routes:
            route.close()

    def _run(self, routes: Sequence[WeightRoute], action: Callable[[WeightRoute], None]) -> None:
        def attempt(route: WeightRoute) -> None:
            try:
                action(route)
            except InputError as error:
                route.close()
                self.fleet.mark_lost(route.engines, error)

        run_parallel(attempt, routes)
        self.fleet.require_available()
