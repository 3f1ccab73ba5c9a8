from rectokens.decoding.trie import Trie


def test_a_prefix_leads_to_its_node():
    trie = Trie()
    trie.insert([0, 2])
    trie.insert([0, 3])
    assert set(trie.find_prefix([0]).children) == {2, 3}
    assert trie.find_prefix([0]).take_step(2) is trie.find_prefix([0, 2])


def test_the_empty_prefix_is_the_root():
    trie = Trie()
    assert trie.find_prefix([]) is trie.root


def test_an_unknown_prefix_has_no_node():
    trie = Trie()
    trie.insert([0, 2])
    assert trie.find_prefix([1]) is None
    assert trie.find_prefix([1, 2, 3]) is None
    assert trie.find_prefix([0, 2, 5]) is None
    assert trie.root.take_step(7) is None


def test_only_ends_are_marked_and_inserting_twice_changes_nothing():
    trie = Trie()
    for _ in range(2):
        trie.insert([0, 2])
    assert not trie.root.is_end_of_token
    assert not trie.find_prefix([0]).is_end_of_token
    assert trie.find_prefix([0, 2]).is_end_of_token
    assert len(trie.root.children) == 1
    assert len(trie.find_prefix([0]).children) == 1


def test_a_prefix_of_another_item_can_be_an_item():
    trie = Trie()
    trie.insert([4, 1])
    trie.insert([4])
    assert trie.find_prefix([4]).is_end_of_token
    assert trie.find_prefix([4, 1]).is_end_of_token
