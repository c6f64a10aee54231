import pytest
from exports import CONFIG
from reference import meta_sam, ours


@pytest.fixture(scope="module")
def torch_sam():
    return meta_sam(CONFIG)


@pytest.fixture(scope="module")
def model(torch_sam):
    return ours(torch_sam, CONFIG)
