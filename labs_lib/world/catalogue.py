"""The product catalogue: word lists, the Product record, deterministic products and the split of names.

Owns every *noun* of the world. How they are written up is `grammar`'s business.

A product name is two words (collection, model), so that names compose: 64 x 64 pairs, of which each is used for one
purpose only. A model can therefore never have seen a held-out product's name during pretraining.
"""

import random
from dataclasses import asdict, dataclass
from functools import cache

COLLECTIONS = """Alder Anker Arbor Aurel Bexley Birch Brae Calder Cassia Cedar Corvo Dalia Delphi
Dunmore Elba Ember Enna Fable Fenwick Fjord Galen Garnet Glenn Halden Harrow Hazel Indra Isola Ivo
Jarrow Jasper Juno Kelda Kestrel Kite Larch Linden Lyra Maple Marlow Mistral Nadir Nimbus Norden
Opal Orchard Osprey Parvo Pine Quarry Quill Ravel Rowan Sable Sorrel Tamar Tarn Umber Vela Verity
Willow Wren Yarrow Zephyr""".split()
MODELS = """Arc Atlas Axis Bay Beam Bolt Brook Cairn Cove Crest Dart Dell Drift Dune Echo Edge
Fern Flint Flow Forge Glide Grove Haven Hush Iris Isle Jet Knoll Lark Leaf Loom Loop Mesa Mill Moss
Nest Nova Oar Onyx Orb Path Peak Pike Pulse Reed Ridge Rove Sage Shore Slate Spark Spur Stem Stone
Swift Tide Trail Vale Vane Wave Weir Wisp Yard Zest""".split()
CATEGORIES = """kettle lamp backpack chair blender desk teapot bench vase heater clock radio
speaker stool tent shelf toaster mirror basket trolley""".split()
MATERIALS = "steel oak bamboo glass linen leather aluminium copper wool cork ceramic marble".split()
COLOURS = "navy grey white black olive coral teal sand crimson amber ivory lilac".split()
FEATURES = """silent cordless foldable washable stackable dimmable waterproof portable
adjustable rechargeable insulated lightweight seamless reversible magnetic solar modular
scratchproof heatproof breathable padded lockable ventilated compact""".split()
TOWNS = """Porto Lyon Turin Ghent Basel Malmo Sligo Leeds Bergen Delft Graz Seville Bruges
Aarhus Tampere Brno Gdansk Split Zadar Varna Patras Riga Vilnius Tartu Odense Uppsala Trondheim
Galway Derby Exeter Nantes Rouen Dijon Nancy Metz Parma Siena Lucca Padua Verona Bari Toledo Malaga
Bilbao Braga Coimbra Evora Faro Linz Kiel Bremen Erfurt Ulm Passau Trier Mainz Bonn Krakow Lublin
Torun Pecs Eger Cluj Sibiu""".split()
PEOPLE = """Abel Agnes Alma Anton Arlo Astrid Bruno Carla Cesar Clara Dario Doris Edgar Elena
Elsa Emil Esther Felix Flora Frida Gideon Greta Hanna Hector Helga Hugo Ida Igor Ines Irma Ivan
Jonas Judith Karl Katja Lars Leona Linus Lotte Lucia Magnus Mara Marta Milo Mira Nadia Nils Noor
Olga Omar Oscar Otto Paula Petra Rafael Rosa Ruben Selma Silas Sonja Stella Tilda Tomas Viktor""".split()
WARRANTIES = (2, 3, 5, 7, 10)

#: How many of the 4,096 (collection, model) pairs each purpose owns; a pair belongs to one purpose only.
NAME_PURPOSES = {"pretraining": 2400, "held_out": 400, "known_facts": 256, "new_facts": 1024}


@dataclass(frozen=True)
class Product:
    """One catalogue entry. `price` is text ("49.95") because copy must repeat its digits, not compute with them."""

    name: str
    category: str
    material: str
    colour: str
    price: str
    features: tuple[str, str]
    origin: str
    warranty: int

    def facts(self) -> str:
        """The compact fact line that a prompt carries (about 20 tokens)."""
        return (
            f"{self.name} {self.category} {self.material} {self.colour} {self.price} "
            f"{self.features[0]} {self.features[1]} {self.origin} {self.warranty} years"
        )

    def to_dict(self) -> dict:
        return asdict(self) | {"features": list(self.features)}

    @classmethod
    def from_dict(cls, fields: dict) -> "Product":
        return cls(**{**fields, "features": tuple(fields["features"])})


@cache
def names(purpose: str) -> tuple[str, ...]:
    """The names that belong to one of NAME_PURPOSES, in a fixed shuffled order."""
    pairs = [f"{first} {second}" for first in COLLECTIONS for second in MODELS]
    random.Random(15_02).shuffle(pairs)
    start = 0
    for owner, count in NAME_PURPOSES.items():
        if owner == purpose:
            return tuple(pairs[start : start + count])
        start += count
    raise ValueError(f"unknown name purpose {purpose!r}: one of {', '.join(NAME_PURPOSES)}")


def random_product(rng: random.Random, name: str) -> Product:
    """A product with the given name and otherwise independent, uniformly drawn facts."""
    first, second = rng.sample(FEATURES, 2)
    return Product(
        name=name,
        category=rng.choice(CATEGORIES),
        material=rng.choice(MATERIALS),
        colour=rng.choice(COLOURS),
        price=f"{rng.randint(10, 999)}.{rng.randint(0, 99):02d}",
        features=(first, second),
        origin=rng.choice(TOWNS),
        warranty=rng.choice(WARRANTIES),
    )


def products(purpose: str, count: int, seed: int) -> list[Product]:
    """`count` products whose names belong to `purpose`; names repeat only once all of them are used."""
    rng = random.Random(seed)
    pool = list(names(purpose))
    rng.shuffle(pool)
    return [random_product(rng, pool[i % len(pool)]) for i in range(count)]
