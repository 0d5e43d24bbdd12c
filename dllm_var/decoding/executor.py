"""The one model call of a step: columns to the device, one forward, readings back in a single transfer.

Owned by `dllm_var.decoding.loop`. It holds the key/value store and the second stream of classifier-free guidance, so
that no policy knows of either.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dllm_var.decoding.noise import keys
from dllm_var.decoding.proposal import Proposer
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Plan, StepView
from dllm_var.model.kv_store import KVRows, KVStore
from dllm_var.model.llada import LLaDAModelLM

Projection = Callable[[Tensor, Tensor], Tensor]  # hidden [M, D], head weight [V, D] -> readings
Outcome = tuple[Tensor, tuple[Tensor, ...] | None]  # readings, per layer the head-mean attention where it is wanted


class Executor:
    """Runs plans on a model.

    Args:
        model: the network, in evaluation mode.
        state: the rows that will be run.
        proposer: turns hidden states into proposals.
        seed: of its noise.
        scratch: None: no store; else the largest number of passing (slot −1) columns in one forward.
        room: how many rows may be held at a time (`admit`); default those of `state`.

    Attributes:
        calls: forwards of the batch so far; stamped on what is stored.
        columns: columns of all forwards so far, padding included. padding: how many of them were padding.
        computed: int64 [B], the positions that the last forward computed for each row, both streams of guidance.
        store: the keys and values; under guidance the conditional rows first, then the unconditional ones.
    """

    def __init__(
        self,
        model: LLaDAModelLM,
        state: DecodeState,
        proposer: Proposer,
        seed: int,
        scratch: int | None = None,
        room: int | None = None,
    ) -> None:
        places = {weight.device for weight in model.parameters()}
        if len(places) > 1 or any(place.type == "meta" for place in places):
            raise ValueError(
                f"the model's weights lie on {', '.join(sorted(map(str, places)))} (device_map; meta: offloaded), but keys "
                "and values are kept on one device: open it on one that holds it whole, with device_map={'': 'cuda:0'}, say."
            )
        self.model, self.proposer, self.seed, self.calls = model, proposer, seed, 0
        self.columns = self.padding = 0
        self.computed = torch.zeros_like(state.forwards)
        self.streams = 2 if proposer.guidance else 1
        self.store = None
        if scratch is not None:
            rows, capacity = state.rows * self.streams, state.tokens.shape[1]
            room = None if room is None else room * self.streams
            self.store = KVStore(model.config, rows, capacity, scratch, model.dtype, model.device, room)

    @property
    def joinable(self) -> bool:
        """Whether `admit` and `chosen` are possible: not under guidance, whose second stream lies behind all rows."""
        return self.streams == 1

    def __call__(self, plan: Plan, state: DecodeState, chosen: Tensor | None = None) -> StepView:
        """One forward over the plan's columns.

        Args:
            chosen: int64 [B], which of the rows that are held those of `state` are; None: all of them.

        Raises:
            ValueError: the model's logits are not numbers.
        """
        assert (plan.slots is None) == (self.store is None), "slots and a store belong together"
        device = self.model.device
        row, _ = plan.wanted.nonzero(as_tuple=True)
        position = plan.positions[plan.wanted]  # [M]
        key = position  # without a temperature nobody draws
        if self.proposer.temperature:
            key = keys(self.seed, state.request[row], state.forwards[row], position)
        key, row, position = torch.stack((key, row, position)).to(device, non_blocking=True)
        ids, positions = torch.stack((plan.ids, plan.positions)).to(device, non_blocking=True)
        if self.streams == 2:
            prompt = (plan.positions < state.prompt[:, None]).to(device)
            ids = torch.cat((ids, ids.masked_fill(prompt, state.mask)))
        project = partial(self.proposer, keys=key, rows=row, positions=position)
        kv = self.store if self.store is None or chosen is None else self.store.some(chosen)
        readings, attentions = self._forward(plan, state, ids, self._twice(positions), project, kv)
        self.calls += 1
        self.columns += plan.real.numel() * self.streams
        self.padding += int((~plan.real).sum()) * self.streams
        readings = readings.cpu()  # the only transfer from device to host
        attentions = None if attentions is None else tuple(a[: state.rows] for a in attentions)
        view = StepView.build(state, plan, readings, tuple(self.proposer.measures), attentions)
        if not bool(view.confidence.isfinite().all()):
            raise ValueError(
                f"the model's logits are not numbers (NaN or infinite) in forward {self.calls}: its weights are damaged, or "
                f"{self.model.dtype} is too narrow for them. Check the checkpoint, or load it with dtype=torch.float32."
            )
        return view

    def _forward(
        self,
        plan: Plan,
        state: DecodeState,
        ids: Tensor,
        positions: Tensor,
        project: Projection,
        kv: KVStore | KVRows | None,
    ) -> Outcome:
        """The network over ids and positions int64 [streams · B, n], both on its device: what other executors replace."""
        # What the store and the choice of rows are indexed by stays on the host, where it costs no synchronisation.
        real = plan.real if self.store is not None else plan.real.to(ids.device)
        self.computed = plan.real.sum(1) * self.streams
        out = self.model(
            input_ids=ids,
            positions=positions,
            attention_mask=None if bool(plan.real.all()) else self._twice(real),
            kv=kv,
            slots=None if plan.slots is None else self._twice(plan.slots),
            query_mask=None if plan.query_mask is None else self._twice(plan.query_mask.to(ids.device)),
            logits_for=self._twice(plan.wanted),
            project=project,
            step=self.calls,
            output_attentions=plan.attention,
        )
        return out.logits, out.attentions

    def admit(self, rows: int) -> None:
        """Make room for further rows, behind those that are held."""
        assert self.joinable
        if self.store is not None:
            self.store.admit(rows)

    def keep(self, rows: Tensor) -> None:
        """Keep only the given rows (int64 indices) of the store, in both streams."""
        if self.store is not None:
            self.store.keep(self._both(rows, self.store.rows))

    def _both(self, rows: Tensor, held: int) -> Tensor:
        """The given rows of each stream, where all streams together hold `held` rows."""
        return torch.cat([rows + stream * (held // self.streams) for stream in range(self.streams)])

    def _twice(self, array: Tensor) -> Tensor:
        return array if self.streams == 1 else torch.cat((array, array))
