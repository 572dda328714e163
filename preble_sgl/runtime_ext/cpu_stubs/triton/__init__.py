"""Stand-in for triton, whose wheel unpacks to a gigabyte that a CPU never uses.

SGLang defines triton kernels when it is imported and launches none on a CPU. So here kernels can be
defined and never launched, and every submodule and attribute can be imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "3.7.0"
__path__ = []

# Lower-case names that SGLang and torch use as types.
_TYPE_NAMES = {"constexpr", "tensor", "dtype", "pointer_type", "block_type"}


class _AnyType:
    """What a type of triton becomes: it can be built, subclassed and subscripted."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __init_subclass__(cls, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls


class _Kernel:
    """What `@triton.jit` returns: it keeps the Python function and refuses to launch it."""

    def __init__(self, fn):
        self.fn = fn
        self.__name__ = getattr(fn, "__name__", "kernel")
        self.__doc__ = getattr(fn, "__doc__", None)
        self.__module__ = getattr(fn, "__module__", None)

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"triton is not installed: kernel {self.__name__} was called")


def _decorator(*args, **kwargs):
    """Serve as `jit` and its kin, both bare and with arguments."""
    if len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], type):
        return _as_kernel(args[0])
    return _as_kernel


def _as_kernel(fn):
    return fn if isinstance(fn, _Kernel) else _Kernel(fn)


class _AnyValue:
    """What any other name becomes: it has every attribute, and serves as a decorator when called."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _AnyValue(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        if args and callable(args[0]):
            return _decorator(*args, **kwargs)
        return _AnyValue(f"{self._name}()")

    def __repr__(self):
        return f"<stand-in for {self._name}>"


class _AnyModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        if full_name in sys.modules:
            return sys.modules[full_name]
        is_type = name[:1].isupper() or name in _TYPE_NAMES
        value = type(name, (_AnyType,), {"__module__": self.__name__}) if is_type else _AnyValue(full_name)
        setattr(self, name, value)
        return value


class _NoDriver:
    """Behaves as triton does on a machine without a GPU: asking for the driver raises."""

    def __getattr__(self, name):
        raise RuntimeError("0 active drivers ([]). There should only be one.")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _AnyModule(spec.name)

    def exec_module(self, module):
        if module.__name__ == "triton.backends":
            module.backends = {}  # torch asks whether "cpu" is in it
        if module.__name__ in ("triton.runtime", "triton.runtime.driver"):
            module.driver = _NoDriver()


sys.meta_path.insert(0, _Submodules())
jit = autotune = heuristics = _decorator


class Config(_AnyType):
    """One configuration of an autotuned kernel."""

    def __init__(self, kwargs=None, num_warps=4, num_stages=2, **extra):
        self.kwargs, self.num_warps, self.num_stages = kwargs or {}, num_warps, num_stages


def cdiv(a, b):
    """Return a / b rounded up."""
    return -(a // -b)


def next_power_of_2(n):
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[:1].isupper():
        return type(name, (_AnyType,), {"__module__": "triton"})
    return importlib.import_module(f"triton.{name}")
