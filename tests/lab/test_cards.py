"""Cards keep what they show: every rule of a guide, line breaks, characters that HTML would swallow."""

from html.parser import HTMLParser

from labs_lib.lab.cards import side_by_side, table, tenant_card
from labs_lib.world.grammar import DIMENSIONS
from labs_lib.world.tenants import load_tenants


class Cells(HTMLParser):
    """Texts of the table's cells, row by row; tags must balance."""

    def __init__(self, source):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_a_tenant_card_lists_every_rule_in_both_forms():
    for tenant in load_tenants():
        card = tenant_card(tenant)
        rows = Cells(card._repr_html_()).rows[1:]
        assert rows == [[rule, value, DIMENSIONS[rule][value]] for rule, value in tenant.style.items()]
        for rule, value in tenant.style.items():
            assert rule in repr(card) and DIMENSIONS[rule][value] in repr(card)
        assert tenant.voice in repr(card)


def test_side_by_side_keeps_lines_and_special_characters():
    texts = {"a < b": "one\n* two & <three>", "plain": "x"}
    card = side_by_side(texts)
    assert Cells(card._repr_html_()).rows == [list(texts), list(texts.values())]
    assert repr(card) == "--- a < b\none\n* two & <three>\n\n--- plain\nx"


def test_a_table_shows_every_value_and_aligns_its_text():
    rows = [{"model": "base", "rules <": 0.5}, {"model": "retrained", "rules <": "1.00"}]
    card = table(rows)
    assert Cells(card._repr_html_()).rows == [["model", "rules <"], ["base", "0.5"], ["retrained", "1.00"]]
    assert repr(card).splitlines() == ["model      rules <", "base           0.5", "retrained     1.00"]
