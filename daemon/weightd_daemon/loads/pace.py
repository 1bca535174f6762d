"""The pace of a load: bytes a second, smoothed over the last seconds."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 5.0
_SPACING_SECONDS = 0.25
_LEAST_SECONDS = 0.1
"""A rate over less time would be noise."""


class LoadPace:
    """Bytes a second of the phase that a load is in. Times are seconds of a clock that only goes forward."""

    def __init__(self) -> None:
        self._phase = ""
        self._done = 0
        self._samples: deque[tuple[float, int]] = deque()
        """When so many bytes were done: at the beginning of the window, and now and then since."""

    def note(self, now: float, phase: str, done: int) -> None:
        """So many bytes of a phase are done. A new phase begins anew, and so does one whose figure goes back."""
        if phase != self._phase or done < self._done:
            self._samples.clear()
            self._phase = phase
        self._done = done
        if not self._samples or now >= self._samples[-1][0] + _SPACING_SECONDS:
            self._samples.append((now, done))
        self._forget(now)

    def rate(self, now: float) -> float:
        """Bytes a second lately; 0 where that is not known yet, or nothing has moved."""
        self._forget(now)
        if not self._samples:
            return 0.0
        since, done = self._samples[0]
        return (self._done - done) / (now - since) if now >= since + _LEAST_SECONDS else 0.0

    def _forget(self, now: float) -> None:
        """Drop what lies before the window, but for the last sample there: the window begins with that."""
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()
