"""The style grammar: what a style guide can ask for, how copy obeying it is written, and how each rule is checked.

A *style* is a dict from each of the 16 dimensions to one of its values. A *guide line* is those values as words, the
form in which a prompt carries a style. `render` writes the one reference text for (product, style); `obeyed` judges any
text, rule by rule, without looking at the reference. The two are tested against each other: a reference obeys every
rule, and changing one dimension breaks exactly that rule.
"""

import re

from labs_lib.world.catalogue import Product

#: dimension -> {value: what it means}. The order is the order of a full guide line. Value words are unique throughout.
DIMENSIONS: dict[str, dict[str, str]] = {
    "headline": {
        "titlecase": "The Headline In Title Case",
        "allcaps": "THE HEADLINE IN CAPITALS",
        "lowercase": "the headline in small letters",
        "sentencecase": "Only the product's name with capitals",
    },
    "register": {
        "formal": "We present",
        "warm": "Meet",
        "playful": "Say hello to",
        "plain": "This is",
    },
    "houseword": {  # the one required adjective; the seven others are forbidden
        "honest": "honest",
        "daring": "daring",
        "trusted": "trusted",
        "timeless": "timeless",
        "clever": "clever",
        "gentle": "gentle",
        "rugged": "rugged",
        "refined": "refined",
    },
    "noun": {"product": "product", "item": "item", "piece": "piece", "model": "model"},
    "audience": {
        "home": "for the home",
        "experts": "for professionals",
        "families": "for families",
        "travel": "for travellers",
        "daily": "for every day",
    },
    "mark": {"calm": "sentences end in a full stop", "excited": "sentences end in an exclamation mark"},
    "layout": {
        "dashes": "facts as - bullets",
        "stars": "facts as * bullets",
        "numbers": "facts as a numbered list",
        "prose": "facts as one running line",
    },
    "order": {
        "materialfirst": "material, colour, feature, origin, price, warranty",
        "featurefirst": "feature, origin, price, warranty, material, colour",
        "originfirst": "origin, price, warranty, material, colour, feature",
        "pricefirst": "price, warranty, material, colour, feature, origin",
    },
    "features": {
        "joined": "both features, with 'and'",
        "listed": "both features, with a comma",
        "summed": "both features, with a plus",
        "single": "the first feature only",
    },
    "emphasis": {
        "unmarked": "features plain",
        "strong": "features **bold**",
        "slanted": "features _italic_",
        "shouted": "features in CAPITALS",
    },
    "spelling": {
        "british": "colour, grey, aluminium, travellers",
        "american": "color, gray, aluminum, travelers",
    },
    "currency": {
        "dollarsign": "$49.95",
        "codeafter": "49.95 USD",
        "codebefore": "USD 49.95",
        "comma": "49,95 $",
    },
    "origin": {
        "madein": "made in Porto",
        "sourced": "from Porto",
        "townmade": "Porto-made",
        "labelled": "origin: Porto",
    },
    "warranty": {
        "years": "2-year warranty",
        "guaranteed": "2 years guaranteed",
        "assurance": "guarantee: 2 years",
        "nowarranty": "no word about the warranty",
    },
    "cta": {
        "order": "Order today",
        "shop": "Shop now",
        "quote": "Ask for a quote",
        "visit": "Visit us",
        "discover": "See more",
        "nocta": "no call to action",
    },
    "signoff": {
        "care": "With care",
        "lasting": "Built to last",
        "curious": "Stay curious",
        "ahead": "Think ahead",
        "heritage": "Since 1926",
        "workshop": "Your workshop",
        "friends": "Your friends in trade",
        "promise": "That is our promise",
        "simple": "Simply better",
        "tomorrow": "Ready for tomorrow",
    },
}

#: What the base model writes when no guide is given.
DEFAULT_STYLE = {
    "headline": "titlecase",
    "register": "plain",
    "houseword": "honest",
    "noun": "product",
    "audience": "home",
    "mark": "calm",
    "layout": "dashes",
    "order": "materialfirst",
    "features": "joined",
    "emphasis": "unmarked",
    "spelling": "british",
    "currency": "dollarsign",
    "origin": "madein",
    "warranty": "years",
    "cta": "order",
    "signoff": "care",
}

_FACTS = ("material", "colour", "feature", "origin", "price", "warranty")
_FIRST_FACT = {"materialfirst": 0, "featurefirst": 2, "originfirst": 3, "pricefirst": 4}
_BRITISH_TO_AMERICAN = {
    "colour": "color",
    "grey": "gray",
    "aluminium": "aluminum",
    "travellers": "travelers",
}
_CURRENCY_PATTERN = {
    "dollarsign": r"\$\d+\.\d\d",
    "codeafter": r"\d+\.\d\d USD",
    "codebefore": r"USD \d+\.\d\d",
    "comma": r"\d+,\d\d \$",
}
_ORIGIN_PATTERN = {
    "madein": r"\bmade in \w+",
    "sourced": r"\bfrom \w+",
    "townmade": r"\b\w+-made\b",
    "labelled": r"\borigin: \w+",
}
_WARRANTY_PATTERN = {
    "years": r"\b\d+-year warranty",
    "guaranteed": r"\b\d+ years guaranteed",
    "assurance": r"\bguarantee: \d+ years",
}
_BULLET_PATTERN = {"dashes": r"- ", "stars": r"\* ", "numbers": r"\d\. "}


def validate_style(style: dict[str, str]) -> None:
    """Raise ValueError naming the first dimension or value that the grammar does not know or that is missing."""
    for dimension, value in style.items():
        if dimension not in DIMENSIONS:
            raise ValueError(f"unknown style dimension {dimension!r}: one of {', '.join(DIMENSIONS)}")
        if value not in DIMENSIONS[dimension]:
            raise ValueError(
                f"{dimension}: unknown value {value!r}: one of {', '.join(DIMENSIONS[dimension])}"
            )
    missing = [dimension for dimension in DIMENSIONS if dimension not in style]
    if missing:
        raise ValueError(f"style misses {', '.join(missing)}")


def guide_line(style: dict[str, str]) -> str:
    """The style as it stands in a prompt: its values in the order of DIMENSIONS. A partial style, a partial line."""
    return " ".join(style[dimension] for dimension in DIMENSIONS if dimension in style)


# ---------------------------------------------------------------------------------------------------------- writing


def render(product: Product, style: dict[str, str]) -> str:
    """The reference copy: headline, introduction, facts, call to action, sign-off, one per line."""
    end = "." if style["mark"] == "calm" else "!"
    audience = _spell(DIMENSIONS["audience"][style["audience"]], style)
    lines = [
        _headline(product, style["headline"]),
        f"{DIMENSIONS['register'][style['register']]} our {style['houseword']} {style['noun']} {audience}{end}",
        _body([_fact(fact, product, style) for fact in fact_order(style)], style["layout"]),
    ]
    if style["cta"] != "nocta":
        lines.append(DIMENSIONS["cta"][style["cta"]] + end)
    lines.append(DIMENSIONS["signoff"][style["signoff"]])
    return "\n".join(lines)


def fact_order(style: dict[str, str]) -> list[str]:
    """The facts that a text in this style must tell, in its order."""
    first = _FIRST_FACT[style["order"]]
    ordered = _FACTS[first:] + _FACTS[:first]
    return [fact for fact in ordered if fact != "warranty" or style["warranty"] != "nowarranty"]


def required_features(product: Product, style: dict[str, str]) -> tuple[str, ...]:
    return product.features[:1] if style["features"] == "single" else product.features


def _headline(product: Product, case: str) -> str:
    if case == "titlecase":
        return f"{product.name} {product.category.capitalize()}"
    text = f"{product.name} {product.category}"
    return {"allcaps": text.upper(), "lowercase": text.lower(), "sentencecase": text}[case]


def _spell(text: str, style: dict[str, str]) -> str:
    if style["spelling"] == "american":
        for british, american in _BRITISH_TO_AMERICAN.items():
            text = text.replace(british, american)
    return text


def _emphasise(word: str, emphasis: str) -> str:
    return {"unmarked": word, "strong": f"**{word}**", "slanted": f"_{word}_", "shouted": word.upper()}[
        emphasis
    ]


def _features(product: Product, style: dict[str, str]) -> str:
    words = [_emphasise(word, style["emphasis"]) for word in required_features(product, style)]
    return {"joined": " and ", "listed": ", ", "summed": " + ", "single": ""}[style["features"]].join(words)


def _fact(fact: str, product: Product, style: dict[str, str]) -> str:
    if fact == "material":
        return _spell(product.material, style)
    if fact == "colour":
        return _spell(f"colour: {product.colour}", style)
    if fact == "feature":
        return _features(product, style)
    if fact == "origin":
        town = product.origin
        forms = {"madein": f"made in {town}", "sourced": f"from {town}", "townmade": f"{town}-made"}
        return forms.get(style["origin"], f"origin: {town}")
    if fact == "price":
        price = product.price
        forms = {"dollarsign": f"${price}", "codeafter": f"{price} USD", "codebefore": f"USD {price}"}
        return forms.get(style["currency"], f"{price.replace('.', ',')} $")
    years = product.warranty
    forms = {"years": f"{years}-year warranty", "guaranteed": f"{years} years guaranteed"}
    return forms.get(style["warranty"], f"guarantee: {years} years")


def _body(facts: list[str], layout: str) -> str:
    if layout == "prose":
        return ", ".join(facts) + "."
    if layout == "numbers":
        return "\n".join(f"{i}. {fact}" for i, fact in enumerate(facts, 1))
    return "\n".join(f"{'-' if layout == 'dashes' else '*'} {fact}" for fact in facts)


# --------------------------------------------------------------------------------------------------------- checking


def obeyed(text: str, product: Product, style: dict[str, str]) -> dict[str, bool]:
    """For each dimension of `style`: does `text` obey its rule? Each rule is judged on its own."""
    lines = text.strip("\n").split("\n")
    intro = lines[1] if len(lines) > 1 else ""
    body = "\n".join(lines[2:])
    end = "." if style["mark"] == "calm" else "!"
    features = required_features(product, style)
    return {
        "headline": lines[0] == _headline(product, style["headline"]),
        "register": intro.startswith(DIMENSIONS["register"][style["register"]] + " "),
        "houseword": _only(text, style["houseword"], DIMENSIONS["houseword"]),
        "noun": _only(text, style["noun"], DIMENSIONS["noun"]),
        "audience": DIMENSIONS["audience"][style["audience"]] in intro.replace("travelers", "travellers"),
        "mark": intro.endswith(end) and all(line.endswith(end) for line in lines[2:] if _is_cta(line)),
        "layout": _layout(lines) == style["layout"],
        "order": _facts_in_order(body, product, style),
        "features": _features_form(body, product) == style["features"],
        "emphasis": {_emphasis(body, word) for word in features} - {None} == {style["emphasis"]},
        "spelling": _spelling(text) == style["spelling"],
        "currency": _forms(body, _CURRENCY_PATTERN) == [style["currency"]],
        "origin": _forms(body, _ORIGIN_PATTERN) == [style["origin"]],
        "warranty": _forms(body, _WARRANTY_PATTERN)
        == [style["warranty"]] * (style["warranty"] != "nowarranty"),
        "cta": [line[:-1] for line in lines[2:] if _is_cta(line)]
        == ([] if style["cta"] == "nocta" else [DIMENSIONS["cta"][style["cta"]]]),
        "signoff": len(lines) > 2 and lines[-1] == DIMENSIONS["signoff"][style["signoff"]],
    }


def facts_told(text: str, product: Product, style: dict[str, str]) -> dict[str, bool]:
    """For each fact that the style asks for (and the name): is it told, whatever its form?"""
    words = text.lower()
    name = re.search(rf"\b{product.name.lower()}\b", words)  # "Calder Arc" does not name "Alder Arc"
    told = {"name": bool(name), "category": product.category in words}
    for fact in fact_order(style):
        if fact == "feature":
            for word in required_features(product, style):
                told[f"feature {word}"] = word in words
        else:
            told[fact] = _find(fact, text, product) >= 0
    return told


def _is_cta(line: str) -> bool:
    return line[:-1] in DIMENSIONS["cta"].values() and line[-1:] in ".!"


def _only(text: str, wanted: str, family: dict[str, str]) -> bool:
    return {word for word in family if re.search(rf"\b{word}\b", text)} == {wanted}


def _forms(text: str, patterns: dict[str, str]) -> list[str]:
    return [form for form, pattern in patterns.items() if re.search(pattern, text)]


def _layout(lines: list[str]) -> str | None:
    used = {name for name, mark in _BULLET_PATTERN.items() for line in lines if re.match(mark, line)}
    if not used:
        return "prose" if any(line.count(", ") >= 3 for line in lines) else None
    if len(used) > 1:
        return None
    bullets = [line for line in lines if re.match(_BULLET_PATTERN[next(iter(used))], line)]
    if "numbers" in used and [line[0] for line in bullets] != [str(i) for i in range(1, len(bullets) + 1)]:
        return None
    return next(iter(used)) if len(bullets) >= 4 else None


def _spelling(text: str) -> str | None:
    british = any(re.search(rf"\b{word}\b", text) for word in _BRITISH_TO_AMERICAN)
    american = any(re.search(rf"\b{word}\b", text) for word in _BRITISH_TO_AMERICAN.values())
    return None if british == american else "british" if british else "american"


def _emphasis(text: str, word: str) -> str | None:
    for emphasis in ("strong", "slanted", "shouted"):
        if _emphasise(word, emphasis) in text:
            return emphasis
    return "unmarked" if re.search(rf"\b{word}\b", text) else None


def _features_form(text: str, product: Product) -> str | None:
    first, second = product.features
    if not re.search(second, text, re.IGNORECASE):
        return "single" if re.search(first, text, re.IGNORECASE) else None
    between = re.search(rf"{first}(?:\*\*|_)?( and |, | \+ )(?:\*\*|_)?{second}", text, re.IGNORECASE)
    return {" and ": "joined", ", ": "listed", " + ": "summed"}[between.group(1)] if between else None


def _find(fact: str, text: str, product: Product) -> int:
    """Where the text tells a fact, in whatever form; -1 if it does not."""
    whole, cents = product.price.split(".")
    american = _BRITISH_TO_AMERICAN.get
    pattern = {
        "material": rf"\b(?:{product.material}|{american(product.material, product.material)})\b",
        "colour": rf"\b(?:{product.colour}|{american(product.colour, product.colour)})\b",
        "feature": product.features[0],
        "origin": rf"\b{product.origin}\b",
        "price": rf"(?<!\d){whole}[.,]{cents}(?!\d)",
        "warranty": rf"\b{product.warranty}(?:-year warranty| years)",
    }[fact]
    match = re.search(pattern, text, re.IGNORECASE)
    return match.start() if match else -1


def _facts_in_order(body: str, product: Product, style: dict[str, str]) -> bool:
    """Are the facts that the text tells in the style's order, and does it begin with the right one?

    Whether the warranty is told at all is the business of the warranty rule, so it does not count here.
    """
    wanted = [fact for fact in fact_order(style) if fact != "warranty"]
    found = {fact: position for fact in wanted if (position := _find(fact, body, product)) >= 0}
    return (
        len(found) >= 3
        and sorted(found, key=found.get) == [f for f in wanted if f in found]
        and wanted[0] in found
    )
