"""One function for each way to declare a parameter; each returns what it was given."""

DEFAULT = object()


class Calls:
    def plain(self, first, second=DEFAULT):
        return first, second

    def keyword_only(self, first, *, key, other=DEFAULT):
        return first, key, other

    def positional_only(self, first, second=DEFAULT, /, third=3):
        return first, second, third

    def only_positional_only(self, first, /):
        return first

    def variable(self, first, *args, key=DEFAULT, **kwargs):
        return first, args, key, kwargs

    def everything(self, first, /, second, *args, key, other=DEFAULT, **kwargs):
        return first, second, args, key, other, kwargs

    def fails(self, first):
        raise LookupError(first)

    def named_result(self, result):
        return result

    def annotated(self, first: "list[NotImported]", second: int = 3) -> "NotImported":  # noqa: F821
        """Says what it does."""
        return first
