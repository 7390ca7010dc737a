from moe_mamba.data import builtin
from moe_mamba.data.builtin import builtin_documents


def test_the_corpus_is_not_trivial() -> None:
    train, validation = builtin_documents("train"), builtin_documents("validation")
    assert len(train) + len(validation) > 500
    assert sum(map(len, train)) + sum(map(len, validation)) > 1_800_000
    assert 20 < len(validation) < 80
    assert 0.02 < sum(map(len, validation)) / sum(map(len, train)) < 0.1


def test_no_document_stands_in_both_splits() -> None:
    train, validation = builtin_documents("train"), builtin_documents("validation")
    assert not set(train) & set(validation)
    seen = set("\n\n".join(train).split("\n\n"))
    held_out = "\n\n".join(validation).split("\n\n")
    assert sum(len(paragraph) for paragraph in held_out if paragraph in seen) < 0.05 * sum(map(len, held_out))


def test_topics_that_longer_ones_quote_are_left_out() -> None:
    topics = builtin._topics()
    assert "topics/compound" in topics
    assert "topics/while" not in topics  # the topic of compound statements quotes it


def test_docstrings_come_in_the_order_of_the_source() -> None:
    source = b"""'One.'
try:
    class A:
        'Two.'
        def f(self):
            'Three.'
except E:
    def g():
        'Four.'
"""
    assert list(builtin._docstrings(source)) == ["One.", "Two.", "Three.", "Four."]
    assert list(builtin._docstrings(b"print 'Python 2'")) == []
