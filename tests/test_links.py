"""Tests for links.py; tests/browser drives the links themselves."""

import ipywidgets
import pytest

from m2f_lab.explore.parts.links import Links


def test_the_browser_gets_the_widgets_by_their_names() -> None:
    slider, menu = ipywidgets.IntSlider(3), ipywidgets.Dropdown(options="abcdefg")
    links = Links([((slider, "value"), (menu, "index"))])
    expected = [f"IPY_MODEL_{slider.model_id}", "value", f"IPY_MODEL_{menu.model_id}", "index"]
    assert [list(pair) for pair in links.get_state()["pairs"]] == [expected]
    links.close()


def test_update_brings_the_targets_up_to_their_sources_in_order() -> None:
    sliders = [ipywidgets.IntSlider(value) for value in (5, 6, 7)]
    links = Links([((sliders[0], "value"), (sliders[1], "value")), ((sliders[1], "value"), (sliders[2], "value"))])
    assert [slider.value for slider in sliders] == [5, 6, 7]  # only a browser links
    links.update()
    assert [slider.value for slider in sliders] == [5, 5, 5]
    links.close()


def test_a_value_that_no_browser_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"IntSlider has no value 'wert'"):
        Links([((ipywidgets.IntSlider(), "wert"), (ipywidgets.IntSlider(), "value"))])
