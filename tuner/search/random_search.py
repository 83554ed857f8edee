"""Random search: what every other search must beat at equal budget."""

from tilewright.tuner.search.base import EnumeratedSearch


class RandomSearch(EnumeratedSearch):
    """Every untried config is equally likely."""

    def _propose(self) -> int:
        return self._any_free()
