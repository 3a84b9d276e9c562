package counts;

import static org.hamcrest.CoreMatchers.is;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThat;

import org.junit.Test;

public class WordsTest {
    @Test
    public void countsEachWord() {
        assertEquals("{a=2, b=1}", Words.of("a b a").toString());
    }

    @Test
    public void spacesCountNothing() {
        assertThat(Words.of("  a \n b ").size(), is(2));
    }
}
