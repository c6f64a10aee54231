from sam_jax.errors import clip, listed


def test_names_of_megabytes_are_cut_in_the_middle():
    assert clip("a" * 200) == "a" * 200
    assert clip("a" * 10**6 + "b" * 90) == "a" * 90 + "..." + "b" * 90


def test_ten_names_are_listed_and_the_rest_counted():
    names = [f"layer_{i}" for i in range(12)]
    assert listed(names[:10]) == ", ".join(names[:10])
    assert listed(names) == ", ".join(names[:10]) + " and 2 more"
