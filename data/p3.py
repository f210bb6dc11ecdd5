"""The data set p3: many tasks, each asked in several ways.

    python -m data.prepare p3

Its prompts are those of P3, the training mixture of T0 (arXiv 2110.08207), as the repository yizhongw/self-instruct has
them: 22 data sets (families), 130 templates (wordings), a file for each.  The rows of five splits are chosen by a rule:

    train, val, test    rows 1 to 60, 61 to 64 and 65 to 70 of a template
    test_templates      30 rows each of wordings that training leaves out, of families that it has
    test_tasks          30 rows each of families that training leaves out

Only rows of at most 640 characters count, in the file's order.  Rows whose prompt is in train are left out of the other
splits.
A row's `task` is its template; `family` says to which data set it belongs.
"""

import hashlib
import json

# family: wordings, with the first digits of the sha256 of their files.  *: a wording that training leaves out
WORDINGS = """
ag_news: classify:d2018058 classify_question_first:35c011ff classify_with_choices:0df817bd
    classify_with_choices_question_first:6b196f5b recommend:fe078670 *which_section_choices:49233f22
amazon_polarity: Is_this_product_review_positive:ccd21bf4 Is_this_review:d0e91c39 Is_this_review_negative:81393dd2
    User_recommend_this_product:123e504f convey_negative_or_positive_sentiment:9ed07ce4 flattering_or_not:f666975e
    negative_or_positive_tone:9171023d *would_you_buy:911288dc
app_reviews: categorize_rating_using_review:1a801e32 convert_to_rating:fb1672b0 convert_to_star_rating:6dd9af74
    *generate_review:2446d344
common_gen: Example_prompt:60bcb54f Given_concepts_type_1:20d79a40 Given_concepts_type_2:134a1ad8
    Put_together:cb99ebe1 choice_in_concept_centric_sentence_generation:d2c5eff3 random_task_template_prompt:a162f934
    sentence_to_concepts:e96f93a6 *topics_from_the_sentence:8b0cd2d3
cosmos_qa: context_answer_to_question:2b85f7aa context_description_question_answer_id:616822d0
    context_description_question_text:8a5034f8 context_question_description_answer_id:84a25450
    context_question_description_answer_text:3cc9939e context_question_description_text:1a4c173c
    description_context_question_answer_id:16f15a28 description_context_question_text:cebcd491 no_prompt_id:d236491d
    *only_question_answer:5544fe3e
dbpedia_14: given_a_choice_of_categories_:221ec9ca given_a_list_of_category_what_does_the_title_belong_to:09502d1e
    given_list_what_category_does_the_paragraph_belong_to:14659f61 *pick_one_category_for_the_following_text:f64a1180
dream: answer_to_dialogue:2aa325b0 baseline:88c9823e generate_first_utterance:47651bbf
    *read_the_following_conversation_and_answer_the_question:c14380cd
gigaword: TLDR:4e53c009 first_sentence_title:e508aca9 generate_summary_for_this:73a883e1 in_a_nutshell:e6d2e5aa
    make_a_title:671afa70 reverse_writing:b1908e60 write_a_title_for_this_sentence:184fbd4c
    *write_its_sentence:0772f855
glue_mrpc: equivalent:29867fee generate_paraphrase:1826b675 generate_sentence:a5432236 paraphrase:86584f75
    replace:210905f3 *want_to_know:3e560229
glue_qqp: answer:c7c66204 duplicate:ad25e229 duplicate_or_not:a6a03def meaning:8c6995fb *same_thing:b1ec668d
kilt_tasks_hotpotqa: combining_facts:f642ce55 complex_question:ded535e1 final_exam:52d5fab0
    *straighforward_qa:c7b6217b
qasc: is_correct_1:52279ecd is_correct_2:ec390b87 qa_with_combined_facts_1:3d94e1ce qa_with_separated_facts_1:94ef9db8
    qa_with_separated_facts_2:2aca435f qa_with_separated_facts_3:141287c2 *qa_with_separated_facts_5:05b7c363
quarel: choose_between:2ad21717 do_not_use:02b3f325 heres_a_story:9ac33792 *testing_students:1b0b17d6
quartz: answer_question_based_on:eb59f90b answer_question_below:0d2e7324 given_the_fact_answer_the_q:d1ca04bc
    having_read_above_passage:58476987 paragraph_question_plain_concat:ca08e101 read_passage_below_choose:879d2f14
    use_info_from_paragraph_question:d910980c use_info_from_question_paragraph:81dd3e36
ropes: plain_no_background:5245064b prompt_bottom_no_hint:1ffec700
rotten_tomatoes: Movie_Expressed_Sentiment:383bdaef Movie_Expressed_Sentiment_2:aa30c740 Reviewer_Enjoyment:b17f9536
    Reviewer_Enjoyment_Yes_No:6cf68cba Reviewer_Expressed_Sentiment:17320384
    Reviewer_Opinion_bad_good_choices:1f56e592 Reviewer_Sentiment_Feeling:5fd007e8 Sentiment_with_choices_:2142bd23
    *Writer_Expressed_Sentiment:cc71550a
samsum: Generate_a_summary_for_this_dialogue:92ccc49e Given_the_above_dialogue_write_a_summary:734e21e4
    Sum_up_the_following_dialogue:b03da61f Summarize_:47b51038 Summarize_this_dialogue_:3289ff87
    *Write_a_dialogue_that_match_this_summary:9c0247f2
sciq: Direct_Question:f15de682 Direct_Question_Closed_Book_:6795bb3d Multiple_Choice:f16f5df5
    Multiple_Choice_Closed_Book_:c6c34fd3 Multiple_Choice_Question_First:d5c631e3
social_i_qa: Check_if_a_random_answer_is_valid_or_not:201a7cf9 Generate_answer:0b1d5efc
    Generate_the_question_from_the_answer:2a693a92 I_was_wondering:19c34ea6 *Show_choices_and_generate_index:07e61905
wiki_qa: Decide_good_answer:95a15485 Is_This_True_:c056f1ad automatic_system:bc1cde0a *found_on_google:382e5242
wiqa: does_the_supposed_perturbation_have_an_effect:07184a6a effect_with_label_answer:7275f854
    effect_with_string_answer:25733c27 what_is_the_final_step_of_the_following_process:d62335ee
    what_is_the_missing_first_step:e88eff39 what_might_be_the_first_step_of_the_process:7114fa29
    *which_of_the_following_is_the_supposed_perturbation:62ac7702
yelp_review_full: based_on_that:8642d60d format_rating:322a7ff2 format_score:c9ef1f09 format_star:c268d219
    on_a_scale:90ddc878 *this_place:06350d1d
"""
UNSEEN_FAMILIES = ("quartz", "sciq")
ROWS = {"train": (0, 60), "val": (60, 64), "test": (64, 70)}
LONGEST = 640  # characters of prompt and completion together
RESULTS = {  # sha256 of the files that come out
    "train": "0b20f64fa3e24e0b6169075ddc3bff8761522c552d5adbbce2d9e78718f79162",
    "val": "24bc1151a02b442415f50b5cd5f13a08de5693bacb7bd0269209813fb101fe91",
    "test": "2d30de69374dd90c9f4a71092998f834f35052503871cddf1c8c305507156816",
    "test_templates": "3d0a24215a1b5535b04f5c5aa98a0b827351206f07a4aca9cee06d742609e6f5",
    "test_tasks": "982e6373e356ee930bda182b8295e84615574fa1d61d320c2ec5e79bc464436e",
}


def read_wordings() -> tuple[dict[str, str], dict[str, list[str]]]:
    """({template: start of its file's sha256}, {split: templates})."""
    hashes = {}
    splits = {"train": [], "test_templates": [], "test_tasks": []}
    prefix = ""
    for word in WORDINGS.split():
        if word.endswith(":"):
            prefix = word[:-1]
            continue
        wording, sha256 = word.split(":")
        template = f"{prefix}_{wording.lstrip('*')}"
        hashes[template] = sha256
        unseen = "test_templates" if wording.startswith("*") else "train"
        splits["test_tasks" if prefix in UNSEEN_FAMILIES else unseen].append(template)
    return hashes, splits


HASHES, TEMPLATES = read_wordings()
FAMILIES = [word[:-1] for word in WORDINGS.split() if word.endswith(":")]


def family(template: str) -> str:
    """The data set that a template asks about; of another task, the task itself."""
    return next((name for name in FAMILIES if template.startswith(f"{name}_")), template)


def choose(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{template: rows} -> {split: rows}, by the rule above."""
    short = {}
    for template, subset in rows.items():
        subset = [clean(row, template) for row in subset]
        short[template] = [row for row in subset if len(row["instruction"]) + len(row["output"]) <= LONGEST]
    splits = {
        split: [row for template in TEMPLATES["train"] for row in short[template][start:stop]]
        for split, (start, stop) in ROWS.items()
    }
    for split in ("test_templates", "test_tasks"):
        splits[split] = [row for template in TEMPLATES[split] for row in short[template][:30]]
    seen = {row["instruction"] for row in splits["train"]}
    for split in splits.keys() - {"train"}:
        splits[split] = [row for row in splits[split] if row["instruction"] not in seen]
    check(splits)
    return splits


def clean(row: dict, template: str) -> dict:
    """A row of a template's file as one of ours: without outer spaces, and without the name of the end token."""
    output = row["output"].strip().removesuffix("<|endoftext|>").strip()
    return {"instruction": row["instruction"].strip(), "input": "", "output": output, "task": template}


def check(rows: dict[str, list[dict]]):
    """Raise ValueError if the files that these rows make are not those that we know."""
    for split, sha256 in RESULTS.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        if hashlib.sha256(text.encode()).hexdigest() != sha256:
            raise ValueError(f"p3 does not give the rows of {split} that it should: --file names other files than ours")
