"""Who sees whom: query i stands at key i + N - M, and sees the keys that a causal mask and a window leave it."""

Window = int | tuple[int | None, int | None] | None


def window_sides(window: Window) -> tuple[int | None, int | None]:
    """Return a window as (left, right), None for unbounded."""
    if window is None or isinstance(window, int):
        return window, window
    left, right = window
    return left, right


def visible_sides(causal: bool, window: Window) -> tuple[int | None, int | None]:
    """Return (left, right): query i sees key j iff -right <= i + N - M - j <= left; None for no bound."""
    left, right = window_sides(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right
