"""The labels that say whose a sandbox is."""

from isopod.pulse.labels import block, kata_labels
from isopod.pulse.model import Pod


def test_names_that_would_be_one_are_said_once() -> None:
    pod = Pod("u", "n", "s", labels=(("a.b", "1"), ("a_b", "2"), ("c", "3")), annotations=(("a.b", "4"),))
    labels = kata_labels("id", pod)
    assert labels[4:] == (("label_a_b", "1"), ("label_c", "3"), ("annotation_a_b", "4"))
    assert len({name for name, _ in labels}) == len(labels)


def test_a_block_escapes_what_the_format_wants_escaped() -> None:
    assert block((("a", 'x"y\\z\n'), ("b", ""))) == b'a="x\\"y\\\\z\\n",b=""'
