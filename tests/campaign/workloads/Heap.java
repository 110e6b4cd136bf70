// Arrays and objects that know what they must contain, under garbage collection: java Heap.java SECONDS MIB
import java.util.HashMap;

public class Heap {
    static final int WORDS = 32768; // 256 KiB
    static long state = 12345;

    static int random(int below) {
        state = state * 6364136223846793005L + 1442695040888963407L;
        return (int) ((state >>> 33) % below);
    }

    static long word(int i, int version, int w) {
        return (i * 8191L + version * 131L + 1) * 0x9E3779B97F4A7C15L + w * 0xD6E8FEB86659FD93L;
    }

    static void corrupt(String what) {
        System.out.println("CORRUPT " + what);
        System.out.flush();
        Runtime.getRuntime().halt(9);
    }

    record Entry(int id, long square, String text, int[] list) {}

    static Entry entry(int i) {
        return new Entry(i, (long) i * i, "value of " + i, new int[] {i, i + 1, i + 2});
    }

    public static void main(String[] arguments) throws Exception {
        long end = System.nanoTime() + Long.parseLong(arguments[0]) * 1_000_000_000L;
        int count = Integer.parseInt(arguments[1]) * 4;
        long[][] blocks = new long[count][];
        int[] versions = new int[count];
        HashMap<String, Entry> objects = new HashMap<>();
        for (int i = 0; i < count; i++) blocks[i] = filled(i, 0, new long[WORDS]);
        for (int i = 0; i < 50000; i++) objects.put("key " + i, entry(i));
        System.out.println("READY");
        long looks = 0, writes = 0;
        while (System.nanoTime() < end) {
            for (int n = 0; n < 40; n++) {
                int i = random(count);
                check(i, versions[i], blocks[i]);
                looks++;
                if (n % 10 == 0) {
                    versions[i] = random(3);
                    blocks[i] = filled(i, versions[i], random(2) == 0 ? new long[WORDS] : blocks[i]);
                    writes++;
                }
            }
            for (int n = 0; n < 3000; n++) {
                int i = random(50000);
                Entry found = objects.get("key " + i);
                if (found.id != i || found.square != (long) i * i || !found.text.equals("value of " + i)
                        || found.list[2] != i + 2) corrupt("object " + i);
                objects.put("key " + i, entry(i));
            }
            Thread.sleep(20);
        }
        for (int i = 0; i < count; i++) check(i, versions[i], blocks[i]);
        System.out.println("OK looks=" + looks + " writes=" + writes);
    }

    static long[] filled(int i, int version, long[] block) {
        for (int w = 0; w < WORDS; w++) block[w] = word(i, version, w);
        return block;
    }

    static void check(int i, int version, long[] block) {
        for (int w = 0; w < WORDS; w++) if (block[w] != word(i, version, w)) corrupt("block " + i + " word " + w);
    }
}
