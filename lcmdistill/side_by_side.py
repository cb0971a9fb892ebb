"""A small network's micro-batch on a CPU, as work that goes side by side: two threads, each with half of the cores.

The operations of such a network are so short that the cores, sharing each of them, mostly wait for one another.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from lcmdistill.batch import Batch, Conditioning, Models, Network, Rng
from lcmdistill.objectives import Objective, forwards, only
from lcmdistill.prediction import X0Eps

SMALL = 2**25
"parameters of a network whose operations one core does as well"


Answered = Callable[[], list[X0Eps]]
"waits for what a network answers"


class Ahead:
    """Two threads: one asks the frozen networks while the other takes the student forward and back.

    The target of a micro-batch is asked when the step before is done, and its teacher one micro-batch earlier: in an LCM's
    step each thread has three forwards' worth. Where no teacher is asked, both find gradients of the student's weights.
    The networks must draw no dropout, and recompute nothing.
    """

    def __init__(self, network: nn.Module, *, asks: bool) -> None:
        cores = max(1, torch.get_num_threads() // 2)
        self.asks = asks
        self._maps = [module for module in network.modules() if is_put_off(module)]
        self.frozen, self._student = (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores,)) for _ in range(2)
        )
        self._weights = WeightGradients(self._maps)

    def asked(
        self, objective: Objective, micro_batches: Iterable[tuple[Rng, Batch, Models]]
    ) -> Iterator[tuple[Rng, Batch, Models]]:
        """The same micro-batches in their order, their networks being asked already, or asked by now.

        The next one is to be taken only when the optimiser has stepped and the target has followed.
        """

        def begun() -> Iterator[tuple[Rng, Batch, Models, Callable[[], Network]]]:
            for rng, batch, models in micro_batches:
                teacher: Callable[[], Network] = partial(getattr, models, "teacher")
                if self.asks:
                    asked = self.frozen.submit(answers, objective, only(models, "teacher"), "teacher", rng, batch)
                    teacher = partial(repeating, asked.result)
                yield rng, batch, models, teacher

        def of_target() -> Future[list[X0Eps]]:
            told = replace(only(models, "target"), teacher=teacher())
            return self.frozen.submit(answers, objective, told, "target", rng, batch)

        given = begun()
        now = next(given, None)
        while now is not None:
            rng, batch, models, teacher = now
            work = partial(answers, objective, only(models, "student"), "student", rng, batch)
            if self.asks:
                target, student = of_target(), self._student.submit(work)
                following = next(given, None)
            else:  # the student's thread has more to do: the others leave it the interpreter at first
                self._weights = WeightGradients(self._maps)
                student = self._student.submit(self._weights.put_off_by, work)
                following = next(given, None)
                target = of_target()
            told = replace(
                models, teacher=teacher(), target=repeating(target.result), student=repeating(student.result)
            )
            yield rng, batch, told
            now = following

    def student(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the rest of the student's work: the loss, and the way back."""
        if self.asks:
            return self.in_thread(work)
        weights = self._weights

        def back() -> Tensor:
            try:
                done = work()
            finally:
                weights.close()
            weights.find()
            return done

        helped, done = self.frozen.submit(weights.find), self._student.submit(back)
        found = done.result()
        helped.result()
        weights.add()
        return found

    def in_thread(self, work: Callable[[], Tensor]) -> Tensor:
        """Do work in the student's thread."""
        return self._student.submit(work).result()


def answers(objective: Objective, models: Models, role: str, rng: Rng, batch: Batch) -> list[X0Eps]:
    """What one of the networks answers in an objective's loss. models: what leads to its question, and itself."""
    heard: list[X0Eps] = []
    network: Network = getattr(models, role)

    def heeded(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        heard.append(network(z, t, c, w))
        return heard[-1]

    objective.loss(replace(models, **{role: heeded}), batch, rng)
    return heard


def repeating(answered: Answered) -> Network:
    """A network that gives what was answered, in its order; waits for it when it is first asked."""

    def each() -> Iterator[X0Eps]:
        yield from answered()

    told = each()
    return lambda z, t, c, w: next(told)


class WeightGradients:
    """Gradients of weights, put off on the way back, which does not need them, and found by as many threads as like to.

    maps: the modules whose weights they are, each `is_put_off` (Qi et al. 2023, "Zero Bubble Pipeline Parallelism",
    section 2: B before W).
    """

    def __init__(self, maps: Sequence[Any]) -> None:
        self._maps = maps
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._found: list[list[tuple[Tensor, Tensor]]] = []

    def put_off_by(self, work: Callable[[], Any]) -> Any:
        """Take a network forward by work; its way back will leave them for `find`."""
        for module in self._maps:
            module.forward = partial(self._forward, module)
        try:
            return work()
        finally:
            for module in self._maps:
                del module.forward

    def _forward(self, module: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # another thread asks the same network as the target
            return type(module).forward(module, x)
        if isinstance(module, nn.Linear):
            return _Linear.apply(self, x, module.weight, module.bias)
        how = module.stride, module.padding, module.dilation, module.groups
        return _Conv2d.apply(self, x, module.weight, module.bias, *how)

    def put_off(self, parameters: Sequence[Tensor | None], gradients: Callable[[], Sequence[Tensor]]) -> None:
        """Leave the gradients of some parameters for `find`. None is a parameter that is not there."""
        place: list[tuple[Tensor, Tensor]] = []
        self._found.append(place)

        def find() -> None:
            pairs = zip(parameters, gradients(), strict=True)
            place.extend(
                (parameter, gradient.to(parameter.dtype)) for parameter, gradient in pairs if parameter is not None
            )

        self._queue.put(find)

    def close(self) -> None:
        """Say that nothing more is put off."""
        self._queue.put(None)

    @torch.no_grad()
    def find(self) -> None:
        """Find what was put off, and what will be, until it is closed."""
        while (find := self._queue.get()) is not None:
            find()
        self.close()  # for whoever else is at it

    def add(self) -> None:
        """Add what was found to the parameters' own, in the way back's order: a sum in another one is rounded otherwise."""
        for parameter, gradient in itertools.chain(*self._found):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def is_put_off(module: nn.Module) -> bool:
    """Whether it is a linear map or a 2-D convolution whose weights learn."""
    if type(module) is nn.Conv2d:
        return module.weight.requires_grad and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear and module.weight.requires_grad


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, weights: WeightGradients, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weights, ctx.parameters = weights, (weight, bias)
        x, weight, bias = _computed(x, weight, bias)
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        ctx.weights.put_off(ctx.parameters, lambda: (rows.t() @ x.reshape(-1, x.shape[-1]), rows.sum(0)))
        return None, grad @ weight if ctx.needs_input_grad[1] else None, None, None


class _Conv2d(Function):
    @staticmethod
    def forward(
        ctx: Any, weights: WeightGradients, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any
    ) -> Tensor:
        ctx.weights, ctx.parameters, ctx.how = weights, (weight, bias), how
        x, weight, bias = _computed(x, weight, bias)
        ctx.save_for_backward(x, weight)
        return functional.conv2d(x, weight, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        how = ctx.how
        ctx.weights.put_off(ctx.parameters, lambda: (conv2d_weight(x, weight.shape, grad, *how), grad.sum((0, 2, 3))))
        of_x = conv2d_input(x.shape, weight, grad, *how) if ctx.needs_input_grad[1] else None
        return None, of_x, None, None, *[None] * len(how)


def _computed(*tensors: Tensor | None) -> list[Any]:
    """In the dtype that autocast computes in."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    return [tensor if tensor is None else tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]


def division(objective: Objective, models: Models, network: nn.Module, *, asks: bool) -> Ahead | None:
    """How this CPU best divides the micro-batches of what is trained, `network`; None leaves them whole.

    asks: whether the teacher is asked at every step.
    """
    if torch.get_num_threads() == 1 or sum(parameter.numel() for parameter in network.parameters()) >= SMALL:
        return None
    return Ahead(network, asks=asks and forwards(objective, models.schedule).get("teacher", 0) > 0)
