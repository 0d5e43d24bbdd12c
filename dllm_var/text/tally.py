"""What a set of samples consists of: counts that add up over chunks, and the summary that is shown of them.

Called by ``dataset/transfer_text2token.py``, which keeps a tally in its progress file so that resumed work counts on.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PLACES = 10  # how many places are named for each reason
BAR = 40  # characters of the longest bar of the histogram


@dataclass
class Tally:
    """Counts over the lines done so far.

    Attributes:
        lines, blank_lines: lines read, and how many of them held nothing but blanks.
        samples, without_prompt: samples written, and how many of them have neither instruction nor input.
        prompt_tokens, response_tokens, eos_tokens: tokens of these samples; EOS are part of the responses.
        lengths: samples by length class; the key is the class's greatest length, in digits.
        dropped: lines that gave no sample, by reason.
        places: for each reason the first lines, as ``file:line``.
        unused_fields: fields of the lines that nothing reads, by name.
    """

    lines: int = 0
    blank_lines: int = 0
    samples: int = 0
    without_prompt: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    eos_tokens: int = 0
    lengths: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unused_fields: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def count(self, prompt: list[int], response: list[int], eos: int | None) -> None:
        """One sample that is written."""
        length = len(prompt) + len(response)
        self.samples += 1
        self.prompt_tokens += len(prompt)
        self.response_tokens += len(response)
        self.eos_tokens += sum(token_id == eos for token_id in response)
        self.lengths[str(max(16, 1 << (length - 1).bit_length()))] += 1

    def drop(self, reason: str, place: str) -> None:
        """One line that gives no sample."""
        self.dropped[reason] += 1
        self._remember(reason, [place])

    def add(self, later: "Tally") -> None:
        """The counts of lines that come after the ones counted here."""
        for name, value in vars(later).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, Counter):
                getattr(self, name).update(value)
        for reason, places in later.places.items():
            self._remember(reason, places)

    @staticmethod
    def restored(saved: dict[str, Any]) -> "Tally":
        """A tally from its `vars` after a journey through JSON."""
        counters = {name: Counter(saved[name]) for name in ("lengths", "dropped", "unused_fields")}
        return Tally(**(saved | counters))

    def report(self) -> dict[str, Any]:
        """The summary as data; shares are fractions of 1."""
        tokens = self.prompt_tokens + self.response_tokens
        return {
            "lines": self.lines,
            "blank_lines": self.blank_lines,
            "samples": self.samples,
            "samples_without_prompt": self.without_prompt,
            "tokens": tokens,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "eos_tokens": self.eos_tokens,
            "eos_share_of_tokens": self.eos_tokens / tokens if tokens else 0.0,
            "eos_share_of_response": self.eos_tokens / self.response_tokens if self.response_tokens else 0.0,
            "lengths_up_to": {key: self.lengths[key] for key in sorted(self.lengths, key=int)},
            "dropped": dict(sorted(self.dropped.items())),
            "dropped_first_places": dict(sorted(self.places.items())),
            "unused_fields": dict(sorted(self.unused_fields.items())),
        }

    def text(self) -> str:
        """The summary for a person."""
        tokens = self.prompt_tokens + self.response_tokens
        mean = tokens / self.samples if self.samples else 0.0
        lines = [
            f"samples   {self.samples:>12,}   from {self.lines:,} lines, {mean:.1f} tokens each",
            f"tokens    {tokens:>12,}",
            f"  prompt  {self.prompt_tokens:>12,}   {_share(self.prompt_tokens, tokens)}",
            f"  response{self.response_tokens:>12,}   {_share(self.response_tokens, tokens)}",
            f"EOS       {self.eos_tokens:>12,}   {_share(self.eos_tokens, tokens)} of all tokens, "
            f"{_share(self.eos_tokens, self.response_tokens)} of the response",
            *self._histogram(),
            f"dropped   {self.dropped.total():>12,}",
        ]
        for reason, number in sorted(self.dropped.items()):
            dots = ", ..." if number > len(self.places[reason]) else ""
            lines.append(f"  {number:,} {reason}: {', '.join(self.places[reason])}{dots}")
        if self.without_prompt:
            lines.append(f"note: {self.without_prompt:,} samples have no prompt at all.")
        if self.unused_fields:
            named = ", ".join(f"{name} ({number:,} lines)" for name, number in sorted(self.unused_fields.items()))
            lines.append(f"note: fields that are not used: {named}.")
        return "\n".join(lines)

    def _histogram(self) -> list[str]:
        if not self.lengths:
            return []
        most, rows, size = max(self.lengths.values()), ["lengths"], 16
        largest = max(int(key) for key in self.lengths)
        while size <= largest:
            number = self.lengths[str(size)]
            smallest = 1 if size == 16 else size // 2 + 1
            rows.append(f"  {smallest:>7,} - {size:<7,}{number:>12,}  {'█' * round(BAR * number / most)}".rstrip())
            size *= 2
        return rows

    def _remember(self, reason: str, places: list[str]) -> None:
        known = self.places.setdefault(reason, [])
        known += places[: PLACES - len(known)]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"
