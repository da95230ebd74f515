# SPDX-License-Identifier: Apache-2.0
"""Life of a request-table row: owners, ledger, and head pages on the device.

Attached to SGLang's ``ReqToTokenPool`` as its auxiliary cache, so that a row's head pages go back
at the very moment at which SGLang frees the row: finish, abort, retraction, flush.

Host and device run apart under overlap scheduling: when the host frees a row, the step that still
contains it may be running. So device pages are returned by operations at the start of the next
forward, on the forward stream, before that forward can take any page. The ledger (host) changes
at once; both orders agree because no forward starts between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairkv_sglang.budgets import AS_SERVER, BudgetScope, Keep
from fairkv_sglang.kernels.pages import UNLIMITED, HeadPages, describe_error
from fairkv_sglang.kernels.prompts import to_device
from fairkv_sglang.memory.admission import Admission
from fairkv_sglang.memory.charges import Charges
from fairkv_sglang.memory.contexts import Contexts
from fairkv_sglang.memory.decisions import DecisionLog
from fairkv_sglang.memory.demand import PageDemand
from fairkv_sglang.memory.device_errors import DeviceErrors
from fairkv_sglang.memory.outputs import OutputRule, Outputs
from fairkv_sglang.memory.page_ledger import PageLedger
from fairkv_sglang.memory.recent import RecentQueries
from fairkv_sglang.memory.residents import Residents
from fairkv_sglang.parallel import RankHeads
from fairkv_sglang.placement import Router
from fairkv_sglang.profiles.recorder import Recorder


@dataclass
class _Life:
    prompt_len: int
    owned: torch.Tensor  # uint8 [lanes], host
    keep: Keep
    recorded: bool  # its kept counts were known before a retraction
    stored: bool = False  # the device holds (or will hold) pages of this row
    kept: torch.Tensor | None = None  # int64 [L, H] host, filled by the prompt's last forward
    counts: NDArray[np.int64] | None = None  # the same, once it is known
    tails: dict[int, torch.Tensor] = field(default_factory=dict)  # see RowBook.tails
    seen: dict[int, Any] = field(default_factory=dict)  # see RowBook.seen


class RowBook:
    """All rows of one rank.

    Args:
        heads: This rank's heads.
        scope: Budget scope.
        demand: Page bounds.
        router: Chooses owners of copied heads, the same on every rank.
        ledger: Pages of all ranks.
        pages: Device state of this rank.
        pool_tokens: Size of the prefill pool; what SGLang may schedule.
        window: Latest prompts whose kept tokens are remembered.
        verbose: Log every decision.
        forecast_factor: For tests; see :class:`Admission`.
        slack: Tokens of output after which a request is compressed again; None: never.
        recent: Queries of the last output tokens, where outputs are compressed.
    """

    def __init__(
        self,
        *,
        heads: RankHeads,
        scope: BudgetScope,
        demand: PageDemand,
        router: Router,
        ledger: PageLedger,
        pages: HeadPages,
        pool_tokens: int,
        window: int = 64,
        verbose: bool = False,
        forecast_factor: float = 1.0,
        slack: int | None = None,
        recent: RecentQueries | None = None,
    ) -> None:
        self.heads = heads
        self.scope = scope
        self.demand = demand
        self.router = router
        self.ledger, self.charges = ledger, Charges(ledger)
        self.pages = pages
        self.errors = DeviceErrors(pages.error)
        self._pool_tokens = pool_tokens
        plan = heads.plan
        sliding = () if scope.sliding is None else scope.sliding.layers
        self.residents = Residents(plan.num_layers, plan.tp_size, plan.num_kv_heads, sliding)
        self.recorder = Recorder(plan.num_layers, plan.num_kv_heads, window)
        rule = None if slack is None else OutputRule(scope, slack)
        self.admission = Admission(scope, demand, router, self.recorder, forecast_factor, rule)
        self.contexts = Contexts()
        self.log = DecisionLog(verbose)
        self.outputs = (
            None if rule is None else Outputs(rule, ledger, self.residents, router, self.log)
        )
        self.recent = recent
        self.peak_requests = 0
        self.peak_pages = np.zeros_like(ledger.capacity)
        self.handed_over_tokens = 0
        self.readmitted = 0  # requests that came back after a retraction
        # Sum of the kept counts of all prompts so far: what a profile is measured from.
        self.kept_sum = np.zeros((plan.num_layers, plan.num_kv_heads), dtype=np.int64)
        self.kept_prompts = 0
        self.kept_prompt_tokens = 0
        self._lives: dict[int, _Life] = {}
        self._to_release: list[int] = []
        self._arriving: dict[int, Callable[[], None]] = {}  # see receive
        self._made_room = False

    # -- admission ------------------------------------------------------------------------------

    def admit(
        self, row: int, prompt_len: int, keep: Keep = AS_SERVER, spilled: bool = False
    ) -> bool:
        """Fix the owners of a request and charge its pages; False for a row in a later chunk.

        Args:
            row: Request-table row.
            prompt_len: Tokens of the prompt.
            keep: What the request wants kept.
            spilled: It was retracted because it had needed more pages than it was charged.
        """
        if row in self._lives:
            return False
        self.admission.certain = spilled
        asked = self.admission.take(row, prompt_len, keep)
        owners = asked.owners
        self.residents.admit(row, owners)
        self.charges.admit(row, asked)
        owned = torch.from_numpy(self.heads.owned(owners))
        self._lives[row] = _Life(prompt_len, owned, keep, spilled)
        said = prompt_len.to_bytes(8, "little") + owners.tobytes() + repr(keep).encode()
        self.log.add("admit", row, said)
        if self.outputs is not None:
            self.outputs.admit(row, prompt_len, keep)
        scope = keep.scope(self.scope, prompt_len)
        if not scope.input_dependent:
            self._settle(row, scope.expected(prompt_len))
        self._note_peak()
        return True

    def owners(self, row: int) -> NDArray[np.int16]:
        """``[L, H]`` owner of each head for the row."""
        return self.ledger.owners(row)

    def owned(self, row: int) -> NDArray[np.uint8]:
        """``[lanes]``: 1 where this rank serves the lane for the row."""
        return self._lives[row].owned.numpy()

    def keep(self, row: int) -> Keep:
        """What the request wants kept."""
        return self._lives[row].keep

    # -- forward --------------------------------------------------------------------------------

    def begin_forward(self, last_chunks: list[int]) -> None:
        """Device work that precedes a forward, on the forward stream.

        Args:
            last_chunks: Rows whose prompt ends in this forward.
        """
        if self._to_release:
            rows = torch.tensor(self._to_release, dtype=torch.int64)
            self.pages.kernels.release(self.pages, to_device(rows, self.pages.device))
            self._to_release.clear()
        for row in last_chunks:
            self.charges.lift(row)
            self._own(row, self.charges.room(row, self.heads.rank))
        for row, store in self._arriving.items():
            self._own(row, UNLIMITED)
            store()
        self._arriving.clear()

    def _own(self, row: int, room: int) -> None:
        life = self._lives[row]
        life.stored = True
        owned = to_device(life.owned, self.pages.device)
        self.pages.kernels.set_owned(self.pages, row, owned, room)

    def note_kept(self, row: int, kept: torch.Tensor) -> None:
        """Remember the kept counts ``int64 [L, H]`` (host memory, maybe still being copied)."""
        self._lives[row].kept = kept

    def kept(self, row: int) -> NDArray[np.int64]:
        """``[L, H]`` tokens that a prompt keeps whose result is on the host."""
        counts = self._lives[row].counts
        if counts is None:
            raise RuntimeError(f"FairKV: the kept counts of row {row} are not known yet")
        return counts

    def receive(self, row: int, store: Callable[[], None]) -> None:
        """Kept rows have come from another server: ``store`` puts them into pages.

        Before the next forward, on its stream, where pages are taken and given back.
        """
        self._arriving[row] = store

    def tails(self, row: int) -> dict[int, torch.Tensor]:
        """Layer -> last queries ``[<=W, n, g, D]`` of a prompt in prefill; they go with the row."""
        return self._lives[row].tails

    def seen(self, row: int) -> dict[int, Any]:
        """Layer -> what the scorer has observed of a prompt in prefill; it goes with the row."""
        return self._lives[row].seen

    # -- decode ---------------------------------------------------------------------------------

    def grow(self, rows: list[int]) -> None:
        """Charge the next token of each row."""
        self.ledger.grow(rows)
        self.residents.grow(rows)
        if self.outputs is not None:
            self.outputs.grow(rows)
        self._note_peak()

    # -- lanes ----------------------------------------------------------------------------------

    def shift_lane(self, source: int, target: int) -> None:
        """The lane of slot ``source`` is in the empty slot ``target`` from now on, with its pages.

        Before a forward, on the forward stream. Slots count over all layers.
        """
        pages = self.pages
        for tensor in (pages.page_table, pages.lens, pages.owned, pages.turn):
            tensor[:, target] = tensor[:, source]
        pages.lens[:, source] = 0
        pages.owned[:, source] = 0
        if self.recent is not None:
            self.recent.shift(source, target)
        for life in self._lives.values():
            life.owned[target], life.owned[source] = life.owned[source].clone(), 0

    # -- after the prompt -----------------------------------------------------------------------

    def hand_over(self, row: int, slots: int) -> bool:
        """The prompt's result is on the host and its ``slots`` go back: counts become exact.

        Returns:
            Whether the prompt spilled (see :class:`Charges`): its row is to be freed before the
            next pass, and no token of it that is decoded until then may be used.
        """
        self.handed_over_tokens += slots
        self._made_room = True
        life = self._lives.get(row)
        if life is None or self.ledger.is_settled(row) or row in self.charges.spilled:
            return row in self.charges.spilled
        if life.kept is None:
            raise RuntimeError(f"FairKV: row {row} ended its prompt without kept counts")
        kept = np.ascontiguousarray(life.kept.numpy(), dtype=np.int64)
        if not self.charges.spill(row, kept):
            self._settle(row, kept)
            return False
        self._record(life, kept)
        self.log.add("spill", row, kept.tobytes())
        return True

    def take_made_room(self) -> bool:
        """Whether a prompt gave slots back since the last call."""
        made, self._made_room = self._made_room, False
        return made

    def _settle(self, row: int, kept: NDArray[np.int64]) -> None:
        self.ledger.settle(row, kept)
        self.router.update(row, kept)
        self.residents.settle(row, kept)
        if self.outputs is not None:
            self.outputs.settle(row, kept)
        life = self._lives[row]
        life.counts = np.asarray(kept, dtype=np.int64)
        if not life.recorded:
            self._record(life, kept)
        self.log.add("settle", row, kept.tobytes())

    def _record(self, life: _Life, kept: NDArray[np.int64]) -> None:
        """What a prompt kept counts once, also if it comes back because it kept too much."""
        # What is expected of the next prompts, and planned for: those with the server's settings.
        # One that keeps everything would weigh as much as many, with nothing to tell heads by.
        if life.keep.spec is None and not life.keep.has_method:
            self.recorder.add(kept, life.prompt_len)
        self.kept_sum += kept
        self.kept_prompts += 1
        self.kept_prompt_tokens += life.prompt_len

    # -- SGLang's auxiliary-cache interface -----------------------------------------------------

    def alloc_to_lengths(
        self, *, req_pool_indices_cpu: torch.Tensor, target_seq_lens_cpu: torch.Tensor
    ) -> None:
        """Nothing: prompts are charged by :meth:`admit`, decode steps by :meth:`grow`."""

    @property
    def dense_capacity(self) -> int:
        """Tokens that SGLang may schedule."""
        return self._pool_tokens

    def free(self, row: int) -> None:
        """SGLang frees ``row``."""
        life = self._lives.pop(row, None)
        if life is None:
            return
        self._arriving.pop(row, None)
        self.charges.release(row)
        self.router.release(row)
        self.residents.release(row)
        if self.outputs is not None:
            self.outputs.release(row)
        if life.stored:
            self._to_release.append(row)
        self.log.add("free", row)

    def clear(self) -> None:
        """SGLang clears its request table (flush at idle)."""
        self.contexts.clear()
        for row in list(self._lives):
            self.free(row)

    def reset_allocator(self) -> None:
        """SGLang resets its slot allocator; head pages went back with their rows."""

    # -- state ----------------------------------------------------------------------------------

    def check_idle(self) -> list[str]:
        """Violations at idle, empty when healthy: on the ledger, the device, in the router."""
        problems: list[str] = []
        self.begin_forward([])
        if np.any(self.ledger.held != 0) or len(self.ledger):
            held = self.ledger.held.tolist()
            problems.append(f"FairKV: head pages still charged at idle: {held}")
        if bits := int(self.pages.error):
            problems.append(f"FairKV: a device kernel reported: {describe_error(bits)}")
        used = self.pages.num_used
        if used:
            problems.append(f"FairKV: {used} head pages leaked on rank {self.heads.rank}")
        if np.any(np.abs(self.router.loads()) > 1e-6):
            problems.append("FairKV: the router still counts tokens of released requests")
        if self.residents.count.any() or self.residents.reads.any():
            problems.append("FairKV: lanes still count residents that have left")
        return problems

    @property
    def live_requests(self) -> int:
        """Requests that hold a row."""
        return len(self._lives)

    def _note_peak(self) -> None:
        self.peak_requests = max(self.peak_requests, len(self._lives))
        np.maximum(self.peak_pages, self.ledger.held, out=self.peak_pages)
