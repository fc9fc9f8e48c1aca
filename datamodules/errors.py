"""What goes wrong by the user's hand, and what is wrong with a sample."""

import re


class UserError(Exception):
    """A mistake in what the user gave: a file, a field, an option.

    The message is complete in itself: it names the file and the field, what was expected, what was found
    and what to do. The command line prints it without a traceback (``--debug`` shows one) and exits with 2.
    """


class BadSample(Exception):  # noqa: N818  (it names the sample, which may be skipped, not a failure of ours)
    """A sample that cannot be used: damaged bytes, an image that does not decode, vertices that are not finite.

    Args:
        kind: what is wrong, in words that are the same for every such sample: they are counted by it.
        detail: what was found in this one.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind


def parsing_error(error: Exception) -> UserError:
    """What jsonargparse says of a wrong option over many lines, in one."""
    text = str(error)
    place = re.findall(r"class_path '([\w.]+)'", text)
    unknown = re.findall(r"Option '([^']+)' is not accepted", text)
    if place and unknown:
        return UserError(f"option '{unknown[-1]}': {place[-1]} has none of that name; see its docstring")
    noise = ("Subtypes:", "Errors:", "Given value", "Does not validate", "- Expected a <class 'NoneType'>")
    lines = (line.strip() for line in text.splitlines())
    return UserError(" ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise)))
