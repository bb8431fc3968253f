"""One prefix for several tasks (`train --task_mixture`)."""
