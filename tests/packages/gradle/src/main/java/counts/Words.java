package counts;

import java.util.Map;
import java.util.TreeMap;

/** Counts words. */
public final class Words {
    private Words() {}

    public static Map<String, Integer> of(String text) {
        Map<String, Integer> found = new TreeMap<>();
        for (String word : text.trim().split("\\s+")) {
            found.merge(word, 1, Integer::sum);
        }
        return found;
    }
}
