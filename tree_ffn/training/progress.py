"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import sys


class Progress:
    """A bar on a terminal, plain lines elsewhere: loss, tokens/s, usage of the trees, time left.

    Args:
      steps: length of the run.
      start: finished steps when it starts or resumes.
      log: takes the plain lines.
      bar: draw a bar; by default where stderr is a terminal.
    """

    def __init__(self, steps: int, start: int, log=print, bar: bool | None = None):
        self._steps, self._log, self._bar, self._note = steps, log, None, ""
        if sys.stderr.isatty() if bar is None else bar:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def step(self, step: int, loss: float) -> None:
        """A step has finished."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}{self._note}", refresh=False)
            self._bar.update(step - self._bar.n)

    def line(
        self, step: int, values: dict[str, float], seconds_left: float | None, usage: bool = True
    ) -> None:
        """Metrics of a window of training steps; `usage`: those of leaves and experts too."""
        note = f", {values['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in values else ""
        self._note = note = note + (_usage(values) if usage else "")
        if self._bar is None:
            left = "" if seconds_left is None else f", {_duration(seconds_left)} left"
            self._log(f"step {step}/{self._steps}: loss {values['loss']:.4f}{note}{left}")

    def say(self, text: str) -> None:
        """One line of its own, above the bar."""
        if self._bar is None:
            self._log(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _usage(values: dict[str, float]) -> str:
    """The worst layer's figures: `, dead leaves <= 25 %, entropy >= 0.71, constant <= 12 %`."""
    parts = []
    for metric, worst, text in (
        ("dead_leaves", max, "dead leaves <= {:.0%}"),
        ("leaf_entropy", min, "entropy >= {:.2f}"),
        ("constant_decisions", max, "constant <= {:.0%}"),
    ):
        layers = [value for name, value in values.items() if name.startswith(f"{metric}/")]
        parts += [f", {text.format(worst(layers))}"] if layers else []
    return "".join(parts)


def _duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
