"""The base class of the tensors that a part of a layer keeps for its backward pass."""


class Activations:
    """Subclasses declare their tensors. An attribute exists from its assignment until drop() deletes it."""

    def drop(self, *names: str) -> None:
        for name in names:
            delattr(self, name)
