import jax
import pytest
from jaxtyping import install_import_hook
from network import needs_package_index

# Shapes and dtypes in the signatures are checked while the tests run, and only then.
install_import_hook("sam_jax", "beartype.beartype")

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def mobile_sam_file():
    """MobileSAM's real checkpoint, from the cache, a hub or the package index."""
    from sam_jax.checkpoints.sources import locate

    with needs_package_index():
        return locate("mobile_sam")
