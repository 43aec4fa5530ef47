"""The zoo: methods that change a linear layer's weight in some way of their own, each in one short file.

`layer` holds what they share: inject_zoo, merge_zoo, count_zoo and the layer that they build on.
"""

from labs_lib.methods.zoo.boft import BOFTLinear
from labs_lib.methods.zoo.layer import ZooLinear
from labs_lib.methods.zoo.loha import LoHaLinear
from labs_lib.methods.zoo.lokr import LoKrLinear
from labs_lib.methods.zoo.miss import MiSSLinear
from labs_lib.methods.zoo.oft import OFTLinear
from labs_lib.methods.zoo.tied_lora import TiedLoRALinear
from labs_lib.methods.zoo.vera import VeRALinear

ZOO: dict[str, type[ZooLinear]] = {
    "vera": VeRALinear,
    "tied_lora": TiedLoRALinear,
    "loha": LoHaLinear,
    "lokr": LoKrLinear,
    "oft": OFTLinear,
    "boft": BOFTLinear,
    "miss": MiSSLinear,
}
