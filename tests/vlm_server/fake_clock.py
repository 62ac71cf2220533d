"""A clock that stands until it is told to go on."""

NS_PER_S = 1_000_000_000


class FakeClock:
    def __init__(self) -> None:
        self.now_ns = 12_345

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, *, s: float = 0, ns: int = 0) -> None:
        self.now_ns += round(s * NS_PER_S) + ns
