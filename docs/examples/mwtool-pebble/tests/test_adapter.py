from mwtool_pebble.adapter import ADAPTER

from mwtool.testing.kit import check_adapter, tiny_config


def test_the_adapter_describes_the_model() -> None:
    check_adapter(ADAPTER, tiny_config("pebble"))
