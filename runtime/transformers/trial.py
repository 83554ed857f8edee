"""One small forward of a model, recorded: what its modules are really called with, and what they give.

Nothing is left behind: buffers, attributes and random states are afterwards what they were.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ROWS, _TOKENS = 2, 6
"""Of the prompt."""
_KNOWN_IDS = (3, 103)
"""Token ids that are drawn: the first ones are often special, and so are those of images, which come late."""
_CACHES = ("cache", "past_key_values", "cache_params")
"""What models call the state that a decoding step goes on from."""
_LARGEST_SAVED_BYTES = 1 << 24
"""Of a buffer. A larger one holds quantised weights, which no forward writes."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, with copies of its tensors."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None

    @property
    def only_tensor(self) -> Tensor | None:
        """The argument of a call with one tensor and nothing else; None for any other."""
        single = len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor)
        return self.args[0] if single else None


@dataclass
class Recording:
    """Calls of a model's modules in a small forward; an ended call has an output."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    """By module name; of the model itself ''."""
    ended: list[tuple[str, int]] = field(default_factory=list)
    """Module and place in its calls, innermost first."""
    begun: list[str] = field(default_factory=list)
    """Modules whose call an exception ended, outermost first."""
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class Trial:
    """What a model is tried on."""

    prompt: Mapping[str, Any]
    steps: bool
    """Whether a decoding step follows, where the model gives a cache."""

    def record(self, model: Any) -> Recording:
        """Calls of ``model``; an exception that it raises is part of what is recorded."""
        recording = Recording()
        with ExitStack() as stack:
            stack.enter_context(undisturbed(model))
            stack.enter_context(torch.no_grad())
            for name, module in model.named_modules():
                for handle in _watch(recording, name, module):
                    stack.callback(handle.remove)
            try:
                self._run(model)
            except Exception as error:
                recording.error = error
        return recording

    def _run(self, model: Any) -> None:
        output = model(**_copied(dict(self.prompt)))
        if not self.steps:
            return
        for name in _CACHES:
            cache = getattr(output, name, None)
            if cache is not None:
                model(input_ids=self.prompt["input_ids"][:, -1:], **{name: cache})
                return


def try_out(model: Any, example: Mapping[str, Any] | None) -> tuple[Trial, Recording]:
    """What ``model`` can be tried on, and its calls: ``example``, else token ids and one step of decoding.

    Where even that raises, the recording holds the exception.
    """
    if example is not None:
        trial = Trial(example, steps=False)
        return trial, trial.record(model)
    try:
        prompt = {"input_ids": _token_ids(model)}
    except Exception as error:
        return Trial({}, steps=False), Recording(error=error)
    trial = Trial(prompt, steps=True)
    recording = trial.record(model)
    if recording.error is not None:
        trial = Trial(prompt, steps=False)
        recording = trial.record(model)
    return trial, recording


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Bring back random states, and the attributes and buffers of ``module`` and its parts, whatever happens."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    has_devices: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    on_devices = torch.cuda.get_rng_state_all() if has_devices else []
    parts = [(part, _attributes(part)) for part in module.modules()]
    buffers = [
        (buffer, buffer.detach().clone())
        for buffer in module.buffers()
        if buffer.device.type != "meta" and buffer.nbytes <= _LARGEST_SAVED_BYTES
    ]
    try:
        yield
    finally:
        for part, attributes in parts:
            _bring_back(vars(part), attributes)
        for buffer, saved in buffers:
            if not _same_bits(buffer, saved):
                with torch.inference_mode():
                    buffer.copy_(saved)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and mappings, a model's output among these."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _watch(recording: Recording, name: str, module: nn.Module) -> Iterator[Any]:
    """Hooks that write down the calls of ``module``."""

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.begun.append(name)
        recording.calls[name].append(Call(_copied(args), _copied(kwargs)))

    def end(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        # A module that calls itself again would be rare; then calls end in the opposite order of how they began.
        at = max(index for index, call in enumerate(recording.calls[name]) if call.output is None)
        call = recording.calls[name][at]
        recording.calls[name][at] = Call(call.args, call.kwargs, _copied(output) if output is not None else ())
        recording.ended.append((name, at))
        recording.begun.pop()

    yield module.register_forward_pre_hook(begin, with_kwargs=True)
    yield module.register_forward_hook(end, with_kwargs=True)


def _token_ids(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    low, high = _KNOWN_IDS
    high = min(high, weight.shape[0])
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(min(low, high - 1), high, (_ROWS, _TOKENS), generator=draw, dtype=torch.int64, device="cpu")
    return ids.to(weight.device)


def _copied(value: Any) -> Any:
    """``value`` with copies of its tensors; other objects, such as caches, are the same."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _copied(item) for key, item in value.items()}
    return value


_CONTENTS = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that map names to its parts."""


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of ``module``, with copies of the mappings that hold its parts."""
    return {name: dict(value) if name in _CONTENTS else value for name, value in vars(module).items()}


def _bring_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Give a module the attributes of ``before``, as :func:`_attributes` returned them."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if name in _CONTENTS:
            now[name].clear()
            now[name].update(value)
        else:
            now[name] = value


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.layout is not torch.strided:
        return True
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))
