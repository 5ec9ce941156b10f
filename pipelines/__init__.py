"""diffusers pipelines; installed as `uplift_diffusers.pipelines`, and usable as custom pipelines file by file."""
