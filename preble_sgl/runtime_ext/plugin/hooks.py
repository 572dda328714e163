"""What the plugin does inside SGLang's scheduler process.

One `Hooks` per process, its methods registered with SGLang's hook registry. An error in one of them must not
end the server: it is kept for the marker, and that feature does nothing from then on.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import metadata
from itertools import count
from typing import Any, TypeVar

from preble_sgl.runtime_ext.plugin import contract
from preble_sgl.runtime_ext.plugin.contract import Feature
from preble_sgl.runtime_ext.plugin.hints import CallHint, Hint, Unpin, read_hints
from preble_sgl.runtime_ext.plugin.pinning import Pinning
from preble_sgl.runtime_ext.plugin.settings import NAME, PluginSettings
from preble_sgl.runtime_ext.ports import to_loopback
from preble_sgl.sim.wait_queue import STOCK_ORDERS, Served, ordered

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True, eq=False)
class Described:
    """A request of SGLang's wait queue as an order looks at it; see `sim.wait_queue.Waiting`."""

    req: Any
    number: int
    program_id: str
    expected_len: float
    served_len: int = 0
    waited_len: int = 0
    beginning: object = None

    @property
    def matched_len(self) -> int:
        """Cached tokens in front of it, as SGLang matched them last."""
        return int(self.req.num_matched_prefix_tokens)

    @property
    def total_len(self) -> int:
        """Tokens that a prefill has to cover: after a retraction also what was generated."""
        return len(self.req.origin_input_ids) + len(self.req.output_ids)


def guarded(feature: Feature) -> Callable[[F], F]:
    """Keep the errors of a hook from SGLang, and switch its feature off after one."""

    def decorate(hook: F) -> F:
        @wraps(hook)
        def run(hooks: "Hooks", *args: Any, **kwargs: Any) -> Any:
            if feature in hooks.errors:
                return None
            try:
                return hook(hooks, *args, **kwargs)
            except Exception as error:
                hooks.errors[feature] = f"{type(error).__name__}: {error}"
                return None

        return run  # type: ignore[return-value]

    return decorate


class Hooks:
    """The state of the plugin in one process."""

    def __init__(self, settings: PluginSettings, features: frozenset[Feature]) -> None:
        self._settings = settings
        self._features = features
        self._attention: Any = None
        self._orders = "order" in features and settings.order not in STOCK_ORDERS
        self._version = metadata.version("preble-sgl")
        self._numbers = count()
        self._served = Served()
        self._pinning: Pinning | None = None
        self.errors: dict[Feature, str] = {}

    def register(self) -> None:
        """Register what the features need."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        def hook(target: contract.Target, function: Callable[..., Any], kind: Any) -> None:
            HookRegistry.register(target.path, function, kind)

        hook(contract.STATE, self.add_marker, HookType.AFTER)
        if self._orders:
            hook(contract.ORDER, self.order_queue, HookType.AROUND)
        if self._features & {"order", "events", "pins"}:
            hook(contract.STEP, self.after_step, HookType.AFTER)
        if "pins" in self._features:
            hook(contract.IDLE, self.before_idle, HookType.BEFORE)
            hook(contract.FLUSH, self.after_flush, HookType.AFTER)
        if "load" in self._features:
            hook(contract.LOAD_SOCKET, on_loopback, HookType.BEFORE)
        if self._settings.shared_prefix == "torch_native" and "shared_prefix" in self._features:
            self._take_place_of("torch_native", _torch_attention)
        if self._settings.shared_prefix == "flashinfer" and "shared_prefix_gpu" in self._features:
            self._take_place_of("flashinfer", _flashinfer_attention)
            hook(contract.GRAPH, self.may_use_graph, HookType.AROUND)

    def _take_place_of(self, name: str, create: Callable[[Any], Any]) -> None:
        """Register our attention under the name of a stock one: of an unknown name SGLang expects Triton."""
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        stock = ATTENTION_BACKENDS[name]

        def create_or_stock(runner: Any) -> Any:
            self._attention = self._created(create, runner)
            return self._attention or stock(runner)

        ATTENTION_BACKENDS[name] = create_or_stock

    @guarded("shared_prefix")
    def _created(self, create: Callable[[Any], Any], runner: Any) -> Any:
        return create(runner)

    def may_use_graph(self, original: Callable[..., bool], runner: Any, batch: Any) -> bool:
        """Run a decode step without its CUDA graph where reading a prefix once gains more."""
        return original(runner, batch) and not self._goes_without_graph(batch)

    @guarded("shared_prefix_gpu")
    def _goes_without_graph(self, batch: Any) -> bool:
        is_ours = self._attention is not None and batch.forward_mode.is_decode()
        return is_ours and self._attention.goes_without_graph(batch)

    def order_queue(
        self, original: Callable[..., None], policy: Any, waiting: list[Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let SGLang match what waits, then put it into our order."""
        described = self._in_order_of_arrival(waiting)
        original(policy, waiting, *args, **kwargs)
        if described:
            self._reorder(waiting, described, kwargs.get("processed_tokens", 0))

    @guarded("order")
    def _in_order_of_arrival(self, waiting: list[Any]) -> list[Described]:
        """Number what is new before SGLang sorts it: it came to the end of the queue."""
        return [self._described(req) for req in waiting]

    @guarded("order")
    def _reorder(self, waiting: list[Any], described: list[Described], processed_len: int) -> None:
        for one in described:
            one.served_len = self._served[one.program_id]
            one.waited_len = max(0, processed_len - getattr(one.req, "arrival_processed_tokens", 0))
        waiting[:] = [one.req for one in ordered(self._settings.order, described)]

    def after_step(self, result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        """Heed what ended with a step of the runtime, and tell at once what that did to the cache."""
        for req in batch.reqs:
            # With the overlap schedule a request that has ended is in the next step's batch, too.
            if req.finished() and not getattr(req, "_preble_sgl_heeded", False):
                req._preble_sgl_heeded = True
                if self._orders:
                    self._count_service(req)
                self._heed_hints(scheduler, req)
        if self._pinning:
            self._expire()
        if "events" in self._features:
            self._publish(scheduler)

    @guarded("order")
    def _count_service(self, req: Any) -> None:
        computed_len = len(req.origin_input_ids) - req.cached_tokens
        self._served.add(self._described(req).program_id, computed_len + len(req.output_ids))

    @guarded("events")
    def _publish(self, scheduler: Any) -> None:
        scheduler.kv_events_publisher.publish_kv_events()

    @guarded("pins")
    def _heed_hints(self, scheduler: Any, req: Any) -> None:
        for hint in _hints(req):
            self._heed(scheduler, req, hint)

    def _heed(self, scheduler: Any, req: Any, hint: Hint) -> None:
        if isinstance(hint, CallHint) or "pins" not in self._features or not _takes_pins(scheduler):
            return
        if self._pinning is None:
            max_tokens = int(self._settings.max_pinned_share * scheduler.max_total_num_tokens)
            self._pinning = Pinning(scheduler.tree_cache.tree_core, max_tokens, time.monotonic)
        if isinstance(hint, Unpin):
            self._pinning.unpin(hint.pin_id)
        else:
            from sglang.srt.mem_cache.common import _req_radix_key

            self._pinning.pin(hint, _req_radix_key(scheduler.tree_cache, req, req.origin_input_ids))

    @guarded("pins")
    def _expire(self) -> None:
        assert self._pinning is not None
        self._pinning.expire()

    @guarded("pins")
    def before_idle(self, scheduler: Any) -> None:
        """Let go of pins that have expired, or for which something waits that else could never start."""
        if self._pinning is None:
            return
        self._pinning.expire()
        if scheduler.waiting_queue and scheduler.running_batch.is_empty():
            self._pinning.drop_all()

    def after_flush(self, success: bool, *args: Any, **kwargs: Any) -> None:
        """Forget the pins of a tree that was thrown away."""
        if success and self._pinning:
            self._pinning.forget()

    def add_marker(self, output: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """Say in `/server_info` that the plugin runs, and what it does."""
        pinning = self._pinning
        output.internal_state[NAME] = {
            "version": self._version,
            "order": self._settings.order,
            "features": sorted(self._features - self.errors.keys()),
            "errors": dict(self.errors),
            "takes_pins": "pins" in self._features and _takes_pins(scheduler),
            "pins": pinning.tokens_by_id if pinning else {},
            "shared_prefix": self._attention is not None,
            "attention": dict(self._attention.counts) if self._attention is not None else {},
        }

    def _described(self, req: Any) -> Described:
        """Return what is known of a request, the same each time. It is numbered when first seen."""
        known: Described | None = getattr(req, "_preble_sgl", None)
        if known is None:
            hint = next((hint for hint in _hints(req) if isinstance(hint, CallHint)), None)
            expected = hint.expected_output_len if hint else None
            limit = req.sampling_params.max_new_tokens
            known = Described(
                req,
                next(self._numbers),
                hint.program_id if hint else str(req.rid),
                limit if expected is None else min(expected, limit),
            )
            req._preble_sgl = known
        return known


def on_loopback(endpoint: str) -> tuple[tuple[str], dict[str, Any]]:
    """Bind on loopback where SGLang takes nothing but a wildcard address."""
    return (to_loopback(endpoint),), {}


def install(settings: PluginSettings) -> None:
    """Register the hooks that fit the installed SGLang."""
    features = frozenset(contract.NEEDS.keys() - contract.broken_features().keys())
    if "marker" in features:
        Hooks(settings, features).register()


def _torch_attention(runner: Any) -> Any:
    from preble_sgl.runtime_ext.plugin.shared_prefix.torch_backend import SharedPrefixTorchBackend

    return SharedPrefixTorchBackend(runner)


def _flashinfer_attention(runner: Any) -> Any:
    if runner.use_mla_backend or runner.is_draft_worker:
        return None
    from preble_sgl.runtime_ext.plugin.shared_prefix.flashinfer_backend import SharedPrefixFlashInferBackend

    return SharedPrefixFlashInferBackend(runner)


def _hints(req: Any) -> list[Hint]:
    envelope = getattr(req, "kv_hints", None)
    return read_hints(envelope.actions) if envelope is not None else []


def _takes_pins(scheduler: Any) -> bool:
    """Whether pins may be kept: the ranks of a tensor-parallel runtime have no common clock for them."""
    return int(scheduler.server_args.tp_size) == 1
