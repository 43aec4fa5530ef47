"""What the tests of the world share: how hypothesis draws a product, a style or a tenant, and its settings."""

from hypothesis import settings
from hypothesis import strategies as st

from labs_lib.world.catalogue import (
    CATEGORIES,
    COLLECTIONS,
    COLOURS,
    FEATURES,
    MATERIALS,
    MODELS,
    TOWNS,
    WARRANTIES,
    Product,
)
from labs_lib.world.tenants import Tenant, load_tenants

# No deadline: the machine may be busy, and no test of the course asserts a time.
settings.register_profile("labs", deadline=None)
settings.load_profile("labs")

# Every product that the catalogue could ever hold, so `@given(product=...)` needs only the type: st.from_type(Product).
st.register_type_strategy(
    Product,
    st.builds(
        Product,
        name=st.builds("{} {}".format, st.sampled_from(COLLECTIONS), st.sampled_from(MODELS)),
        category=st.sampled_from(CATEGORIES),
        material=st.sampled_from(MATERIALS),
        colour=st.sampled_from(COLOURS),
        price=st.builds("{}.{:02d}".format, st.integers(10, 999), st.integers(0, 99)),
        features=st.lists(st.sampled_from(FEATURES), min_size=2, max_size=2, unique=True).map(tuple),
        origin=st.sampled_from(TOWNS),
        warranty=st.sampled_from(WARRANTIES),
    ),
)
st.register_type_strategy(Tenant, st.deferred(lambda: st.sampled_from(load_tenants())))
