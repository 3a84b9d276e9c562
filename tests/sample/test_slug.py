import unittest

from slug import slug


class SlugTest(unittest.TestCase):
    def test_lower_case_and_single_dashes(self):
        self.assertEqual(slug("Hot  Cells, Cold Keys"), "hot-cells-cold-keys")


if __name__ == "__main__":
    unittest.main()
