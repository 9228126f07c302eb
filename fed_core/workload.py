"""What a user writes: a model, its loss, and how a site's data is read.

A workload is installed at every site, under a name that travels; its code never does. It is found by entry point (group
"fedstream.workloads") or in the file that the local user gives. Nothing here imports torch until a model is built, so that the
daemon can speak of workloads without it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, Union

from fed_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.data import Dataset

    from fed_core.plan import OptimizerPlan

ENTRY_POINT_GROUP: Final = "fedstream.workloads"
MAX_NAME_BYTES: Final = 100
_OPTION_WORDS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

Data: TypeAlias = Union["Dataset[Any]", "tuple[Tensor, ...]"]
"""A map-style dataset (with a length), or tensors whose first dimension counts the examples: `(x, y)`."""


@dataclass(frozen=True, slots=True)
class Site:
    """What the local settings say of a site: its name, where its data lies, and options for the workload."""

    name: str = "site"
    data: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def data_path(self) -> Path:
        """Where the data lies. Raises ConfigError where the settings do not say, or nothing is there."""
        if self.data is None:
            raise ConfigError("this workload reads files, and no place was given; start fed-client with --data PATH")
        if not self.data.exists():
            raise ConfigError(f"--data: there is no {self.data}; correct the path, or mount the folder")
        return self.data

    def integer(self, name: str, default: int | None = None) -> int:
        """An option as an integer. Raises ConfigError where it is none, or is missing and has no default."""
        return int(self._number(name, default, int, "an integer"))

    def number(self, name: str, default: float | None = None) -> float:
        """An option as a number. Raises ConfigError where it is none, or is missing and has no default."""
        return float(self._number(name, default, float, "a number"))

    def flag(self, name: str, default: bool = False) -> bool:
        """An option as true or false. Raises ConfigError for any other word."""
        word = self.options.get(name)
        if word is None:
            return default
        if word.lower() not in _OPTION_WORDS:
            raise ConfigError(f"option {name} is {word!r}; expected true or false")
        return _OPTION_WORDS[word.lower()]

    def allow_options(self, *names: str) -> None:
        """Raises ConfigError for an option that is not one of these: a misspelt one would silently do nothing."""
        for name in self.options:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                cure = f"did you mean {near[0]}?" if near else f"known are {', '.join(names) or 'none'}"
                raise ConfigError(f"option {name}: this workload has no such option; {cure}")

    def _number(self, name: str, default: float | None, read: type[int] | type[float], expected: str) -> float:
        word = self.options.get(name)
        if word is None:
            if default is None:
                raise ConfigError(f"option {name} is missing; give --option {name}={expected.replace(' ', '-')}")
            return default
        try:
            return read(word)
        except ValueError:
            raise ConfigError(f"option {name} is {word!r}; expected {expected}") from None


class Workload(ABC):
    """A learning task. Subclass it, give it a `name`, and write `model`, `train_data` and `loss`; the rest has defaults.

    One object lives as long as its process, and a site's data is read once per process; nothing else may be carried from one
    assignment to the next, for a restart in between would then change the result. Methods may raise ConfigError with a cure.
    """

    name: ClassVar[str]
    """Name on the wire, 1 to 100 bytes; runs ask for it."""
    version: ClassVar[str] = "1"
    """Raise it when the model or the meaning of the data changes."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model on the CPU. Called under a fixed seed; its values are then replaced by the run's wherever they are shared."""

    @abstractmethod
    def train_data(self, site: Site) -> Data:
        """The site's training data, on the CPU. Read once in the life of the trainer process, under a fixed seed, and kept as it is
        returned."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss over a batch that is on the model's device: a scalar to differentiate."""

    def evaluation_data(self, site: Site) -> Data | None:
        """The site's held-out data. None: this site does not take part in evaluations."""
        return None

    def coordinator_data(self, path: Path | None) -> Data | None:
        """Public data at the coordinator, from the path in its settings. None: it cannot evaluate."""
        return None

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, float | Tensor]:
        """Means over a batch, by name (a-z, 0-9, _ and dot); averaged over the examples. The model is in evaluation mode."""
        return {"loss": self.loss(model, batch)}

    def collate(self, examples: Sequence[Any]) -> Any:
        """A batch out of the examples of a Dataset; torch's own rule. Data given as a tuple of tensors is cut, not collated."""
        from torch.utils.data import default_collate

        return default_collate(list(examples))

    def optimizer(self, model: nn.Module, plan: OptimizerPlan) -> Optimizer:
        """The optimizer that the plan names, over the parameters that take a gradient."""
        from torch import optim

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate, decay = plan.learning_rate, plan.weight_decay
        if plan.kind == "sgd":
            return optim.SGD(parameters, lr=rate, momentum=plan.momentum, weight_decay=decay)
        rules: dict[str, type[optim.Adam] | type[optim.AdamW]] = {"adam": optim.Adam, "adamw": optim.AdamW}
        rule = rules[plan.kind]
        return rule(parameters, lr=rate, weight_decay=decay)

    def training_step(self, model: nn.Module, batch: Any, optimizer: Optimizer) -> Tensor:
        """One step on one batch; returns the batch's mean loss. Override it for clipping, a proximal term, mixed precision."""
        optimizer.zero_grad()
        loss = self.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def custom_weight(self, site: Site, num_examples: int) -> int:
        """Weight of this site's update in a run that weights by "custom"; the number of examples unless overridden."""
        return num_examples


def initial_model(workload: Workload, seed: int) -> nn.Module:
    """The workload's model as this seed makes it. The caller's random numbers go on as if nothing had happened.

    Raises ConfigError where `model()` returns something else than a module.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = workload.model()
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"{type(workload).__name__}.model() returned {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


def load_workload(source: str) -> Workload:
    """The workload that the local user names: an installed one, or `path/to/file.py[:ClassName]`.

    Raises ConfigError that lists what there is. Whatever the file itself raises passes through. A file's folder becomes
    importable, after everything that is installed, so that it may have neighbours.
    """
    path, class_name = _split(source)
    if path is None:
        return _installed(source)
    if not path.is_file():
        raise ConfigError(f"workload: there is no file {path}; correct the path, or give the name of an installed one")
    return _instance(_pick_class(_import_file(path), class_name, path), source)


def _split(source: str) -> tuple[Path | None, str | None]:
    path, separator, class_name = source.rpartition(":")
    if separator and path.endswith(".py") and class_name.isidentifier():
        return Path(path), class_name
    is_path = source.endswith(".py") or "/" in source
    return (Path(source) if is_path else None), None


def _installed(name: str) -> Workload:
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        known = f"installed are {', '.join(sorted(found))}" if found else "none is installed"
        raise ConfigError(
            f"workload: no installed workload is called {name!r} ({known}); or give path/to/file.py[:Class]"
        )
    return _instance(_load_entry(found[name]), name)


def _load_entry(entry: EntryPoint) -> type[Workload]:
    loaded = entry.load()
    if not (inspect.isclass(loaded) and issubclass(loaded, Workload)):
        raise ConfigError(f"workload: the entry point {entry.name} = {entry.value} is not a subclass of Workload")
    return loaded


def _import_file(path: Path) -> ModuleType:
    resolved = path.resolve()
    # Two files of one name are two modules; the same file is one, or classes would be defined twice.
    digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:12]
    name = f"fedstream_workload_{re.sub('[^0-9A-Za-z_]', '_', resolved.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    if str(resolved.parent) not in sys.path:
        sys.path.append(str(resolved.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _pick_class(module: ModuleType, class_name: str | None, path: Path) -> type[Workload]:
    found = {
        name: member
        for name, member in vars(module).items()
        if inspect.isclass(member) and issubclass(member, Workload) and member.__module__ == module.__name__
    }
    if class_name is not None:
        if class_name not in found:
            raise ConfigError(
                f"workload: {path} has no workload class {class_name}; it has {', '.join(found) or 'none'}"
            )
        return found[class_name]
    concrete = {name: member for name, member in found.items() if not inspect.isabstract(member)}
    # A file with one class that forgot a method is better explained by that class than by "none".
    candidates = concrete or found
    if len(candidates) != 1:
        have = f"has {', '.join(candidates)}; say which: {path}:{next(iter(candidates))}" if candidates else "has none"
        raise ConfigError(f"workload: {path} must hold one subclass of fed_core.workload.Workload; it {have}")
    return next(iter(candidates.values()))


def _instance(cls: type[Workload], source: str) -> Workload:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"workload: {cls.__name__} in {source} must still define {', '.join(missing)}")
    for attribute in ("name", "version"):
        value = getattr(cls, attribute, None)
        if not isinstance(value, str) or not 1 <= len(value.encode()) <= MAX_NAME_BYTES:
            raise ConfigError(
                f"workload: {cls.__name__}.{attribute} is {value!r}; expected a string of 1 to {MAX_NAME_BYTES} bytes, "
                f'such as {attribute} = "{"digits" if attribute == "name" else "1"}"'
            )
    return cls()
