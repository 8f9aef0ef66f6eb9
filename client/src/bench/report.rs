//! The report as one HTML file: the page beside this file with the results put into it. It asks
//! no network for anything, so that it can be mailed, archived and opened years later.

use serde_json::Value;

const PAGE: &str = include_str!("report.html");

/// Where the results go.
const PLACE: &str = "/*RESULTS*/[]";

/// The page for these results: one test, or the steps of a sweep in the order they ran.
pub(crate) fn page(results: &[Value]) -> String {
    let json = Value::Array(results.to_vec()).to_string();
    // A `<` in a string must not end the script.
    let json = json.replace('<', "\\u003c");
    PAGE.replacen(PLACE, &json, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn results_stand_in_the_page_and_cannot_leave_the_script() {
        let page = page(&[json!({"label": "</script><b>x"})]);
        assert!(page.contains(r#"[{"label":"\u003c/script>\u003cb>x"}]"#));
        assert!(!page.contains(PLACE));
        assert!(!page.contains("src=\"http") && !page.contains("href=\"http"));
        assert_eq!(page.matches("</script>").count(), 1);
    }
}
